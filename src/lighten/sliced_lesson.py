"""A lesson for large vocabularies: logits exist for a slice of positions at a time.

Student and teacher show what their heads are given; each slice goes through the heads, through the
lesson and straight back, so that of 512 x 49,152 logits never more than a slice is in memory, and
nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lighten.divergence import Head
from lighten.errors import WrongUse
from lighten.lesson import Lesson, Parts
from lighten.seen import Seen

LOGITS = 2**25
"""Logits in a slice: 128 MB, of which about four stand at once."""

INSIDE = ("hidden", "blocks")
"""Losses that compare what leaves the blocks of two language models."""

Weight = Callable[[], tuple[Tensor, Tensor | None]]


class SlicedLesson:
    """`lesson` behind the heads. Called as a lesson is, with hidden states as the outputs.

    head: gives the student's weight (vocabulary, width) and bias, with their gradients. like: the
    original's head: what it does to logits is done to the student's too, and it makes the teacher's
    where the teacher shows hidden states (no `indices`). precision: as the loop has it, of the
    products with the heads. own: the student's head where what it does to logits is its own.
    inside: losses that compare blocks are not sliced. Raises WrongUse for what `check` refuses.
    """

    def __init__(
        self, lesson: Lesson, head: Weight, like: Head, precision: str = "32-true",
        own: Head | None = None, inside: bool = False,
    ) -> None:  # fmt: skip
        self.check(lesson, inside)
        self.lesson, self.head, self.like, self.precision = lesson, head, like, precision
        self.own = like if own is None else own
        terms = [term for term in lesson.terms if term.weight]
        self.outer = Lesson(tuple(term for term in terms if "hidden" in term.loss.needs))
        self.sliced = Lesson(tuple(term for term in terms if "hidden" not in term.loss.needs))

    @staticmethod
    def check(lesson: Lesson, inside: bool = False) -> None:
        """Raises WrongUse for a lesson that needs more than outputs and labels; inside: and what
        `hidden` and `blocks` look at."""
        refused = lesson.needs - {"labels"}
        if inside and all(
            term.name in INSIDE for term in lesson.terms if "hidden" in term.loss.needs
        ):
            refused -= {"hidden"}
        if refused:
            more = ', "hidden" or "blocks"' if inside else ""
            raise WrongUse(
                f"`{lesson}` needs {', '.join(sorted(refused))}, which is not kept of language"
                " models",
                f'learn from outputs: "logits:1", "topk:1:k=64" or "labels"{more}',
            )

    def __str__(self) -> str:
        return str(self.lesson)

    @property
    def terms(self) -> Any:
        return self.lesson.terms

    @property
    def needs(self) -> frozenset[str]:
        return self.lesson.needs

    @property
    def ends(self) -> bool:
        return self.outer.ends

    @property
    def taught(self) -> bool:
        return self.lesson.taught

    def start(self, student: Seen, teacher: Seen | None = None, seed: int = 0) -> Parts:
        """What losses inside train beside the student: projections, where widths differ."""
        own = self.outer.start(student, teacher, seed) if self.outer.terms else nn.ModuleDict()
        return Parts(self, dict(own.items()))  # type: ignore[arg-type]

    def __call__(
        self,
        student: Seen,
        teacher: Seen | None = None,
        labels: Tensor | None = None,
        parts: Mapping[str, nn.Module] | nn.ModuleDict | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(weighted sum, loss -> its value); hidden states (batch, length, width)."""
        if not self.outer.terms:
            return self._sliced(student, teacher, labels)
        total, values = self.outer(student, teacher, labels, parts)
        if not self.sliced.terms:
            return total, values
        other, more = self._sliced(student, teacher, labels)
        return total + other, {**more, **values}

    def _sliced(
        self, student: Seen, teacher: Seen | None, labels: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same of what looks at logits and labels alone."""
        hidden = student.outputs.flatten(0, -2)
        weight, bias = self.head()
        shown = None if teacher is None else _rows(teacher)
        targets = None if labels is None else labels.reshape(-1)
        size = max(1, LOGITS // len(weight))

        halves = self.precision != "32-true"

        def run(h: Tensor, w: Tensor, b: Tensor | None, back: bool) -> dict[str, Tensor]:
            sums: dict[str, Tensor] = {}
            # autocast would convert both heads again for each slice, and each slice's gradient
            used = w.detach().bfloat16().requires_grad_(w.requires_grad) if halves else w
            like = self.like
            if halves and shown is not None and shown.indices is None:
                like = replace(like, weight=like.weight.bfloat16())
            for start in range(0, len(h), size):
                at = slice(start, start + size)
                share = len(h[at]) / len(h)
                with torch.autocast(h.device.type, torch.bfloat16, halves):
                    there = None if shown is None else _teacher(shown, at, like)
                    mine = Seen(logits(h[at], used, b, self.own))
                total, values = self.sliced(mine, there, None if targets is None else targets[at])
                if back:
                    (total * share).backward()  # type: ignore[no-untyped-call]
                    _collect(w, used)
                for name, value in {"": total.detach(), **values}.items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value * share
            return sums

        if not torch.is_grad_enabled():
            sums = run(hidden, weight, bias, False)
            return sums.pop(""), sums
        sums = {}
        total: Tensor = _Through.apply(hidden, weight, bias, run, sums)  # type: ignore[no-untyped-call]
        sums.pop("")
        return total, sums


def _teacher(shown: Seen, at: slice, like: Head) -> Seen:
    if shown.indices is not None:
        return Seen(shown.outputs[at], indices=shown.indices[at])
    with torch.no_grad():
        return Seen(logits(shown.outputs[at], like.weight, like.bias, like))


def _collect(weight: Tensor, used: Tensor) -> None:
    """Add the gradient of what was used in place of a weight to its own, in its own precision."""
    if used is weight or used.grad is None:
        return
    if weight.grad is None:
        weight.grad = used.grad.to(weight.dtype)
    else:
        weight.grad.add_(used.grad)
    used.grad = None


class _Through(torch.autograd.Function):
    """Gradients are computed on the way forward, slice by slice, and handed on."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, run: Any, sums: Any
    ) -> Tensor:
        leaves = [
            None if t is None else t.detach().requires_grad_(t.requires_grad)
            for t in (hidden, weight, bias)
        ]
        with torch.enable_grad():
            sums.update(run(*leaves, any(t is not None and t.requires_grad for t in leaves)))
        ctx.save_for_backward(*[None if t is None else t.grad for t in leaves])
        return sums[""].clone()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        found = [None if t is None else t * grads[0] for t in ctx.saved_tensors]
        return (*found, None, None)


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, like: Head) -> Tensor:
    """(positions, vocabulary), with what `like` does to logits; differentiable."""
    z = nn.functional.linear(hidden, weight, bias)
    if like.scale != 1.0:
        z = z * like.scale
    return z if like.softcap is None else torch.tanh(z / like.softcap) * like.softcap


def _rows(shown: Seen) -> Seen:
    """With positions in one dimension."""
    indices = None if shown.indices is None else shown.indices.flatten(0, -2)
    return Seen(shown.outputs.flatten(0, -2), indices=indices)
