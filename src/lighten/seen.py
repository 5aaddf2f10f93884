"""What a network shows of one batch, and what losses do with it before they compare.

Shapes are checked here, so that a student and a teacher that do not go together are told so by
name, not by a matrix product deep inside a loss.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lighten.errors import BadInput, WrongUse

INSIDE = frozenset({"hidden", "attention"})
"""What losses need of places within the networks."""

IGNORED = -100
"""A label that stands for none, as in torch and transformers."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What a network shows of one batch.

    outputs: (batch, ..., classes), logits. hidden: place -> (batch, ...), in order of depth.
    attention: place -> (batch, heads, queries, keys), rows that sum to 1. indices: where a teacher
    was stored as its k likeliest classes: (batch, ..., k), and outputs are their log-probabilities.
    others: of a network with several outputs, those beside the first, each (batch, ..., classes).
    """

    outputs: Tensor
    hidden: Mapping[str, Tensor] = field(default_factory=dict)
    attention: Mapping[str, Tensor] = field(default_factory=dict)
    indices: Tensor | None = None
    others: tuple[Tensor, ...] = ()

    def each(self, change: Callable[[Tensor], Tensor]) -> Seen:
        """The same with every floating tensor changed."""
        return replace(
            self,
            outputs=change(self.outputs),
            hidden={name: change(x) for name, x in self.hidden.items()},
            attention={name: change(x) for name, x in self.attention.items()},
            others=tuple(change(x) for x in self.others),
        )


class Loss(Protocol):
    """What a student learns from. A frozen dataclass: its fields are the options.

    source: the paper. needs: of "labels", "hidden", "attention". taught: it looks at the teacher.
    floor: 0 where the student shows what the teacher shows; None where the least is not known.
    A loss gets tensors of float32 or wider, the teacher's without a gradient. One that trains parts
    of its own also has start(student, teacher) -> nn.Module | None.
    """

    source: Any  # a ClassVar, which a protocol cannot ask for in the same words
    floor: Any
    taught: Any

    @property
    def needs(self) -> frozenset[str]:
        """What it looks at beside the outputs."""

    def __call__(
        self, student: Seen, teacher: Seen, labels: Tensor | None, parts: nn.Module | None
    ) -> Tensor:
        """A scalar, the mean over the batch; raises WrongUse, BadInput."""


def wide(x: Tensor) -> Tensor:
    """At least float32: sums of exponentials need it."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def same_outputs(student: Seen, teacher: Seen) -> tuple[Tensor, Tensor]:
    """Both outputs as (rows, classes); raises WrongUse where they cannot match."""
    if teacher.indices is not None:
        raise WrongUse(
            f"the teacher was stored as its {teacher.indices.shape[-1]} likeliest classes only",
            "learn from `topk`, or from a teacher that runs",
        )
    s, t = student.outputs, teacher.outputs
    if s.shape != t.shape:
        raise WrongUse(
            f"the student's outputs are {tuple(s.shape)}, the teacher's {tuple(t.shape)}",
            "both need the same classes for the same inputs; `hidden`, `relations` and"
            " `contrastive` compare networks whose outputs differ",
        )
    return rows(s), rows(t)


def same_logits(student: Seen, teacher: Seen, loss: str) -> tuple[Tensor, Tensor]:
    """The same for a loss that compares classes; raises WrongUse where there is one alone, of
    which every network is equally sure."""
    s, t = same_outputs(student, teacher)
    if s.shape[-1] < 2:
        raise WrongUse(*no_classes(loss))
    return s, t


def no_classes(loss: str) -> tuple[str, str]:
    """What to say where outputs have one class, which is a number: there is nothing to compare."""
    return (
        f"`{loss}` compares classes, and an output has one number where these would be",
        'learn from the number: "outputs:1"',
    )


def rows(x: Tensor) -> Tensor:
    """(rows, last dimension)."""
    return x.reshape(-1, x.shape[-1])


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax over the last dimension, finite where a logit is -infinity (a masked class)."""
    return F.log_softmax(logits, -1).clamp(min=-1e30)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats over the last dimension, the mean over the rest."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def checked_labels(outputs: Tensor, labels: Tensor | None, loss: str) -> Tensor:
    """(rows,) int64, one for each row of the outputs; raises WrongUse, BadInput."""
    if labels is None:
        raise WrongUse(
            f"`{loss}` needs labels, and the data has none",
            "learn from `logits`, which needs a teacher only, or give data with labels",
        )
    if labels.is_floating_point() or labels.shape != outputs.shape[:-1]:
        raise WrongUse(
            f"labels are {labels.dtype} {tuple(labels.shape)}, outputs {tuple(outputs.shape)}",
            f"one integer for each of {tuple(outputs.shape[:-1])}",
        )
    classes = outputs.shape[-1]
    if classes < 2:
        raise WrongUse(*no_classes(loss))
    flat = labels.reshape(-1).to(outputs.device, torch.int64)
    wrong = (flat != IGNORED) & ((flat < 0) | (flat >= classes))
    if bool(wrong.any()):
        value = int(flat[wrong][0])
        raise BadInput(
            f"a label is {value}, but the network has {classes} classes: 0 to {classes - 1}",
            f"labels count from 0; {IGNORED} marks what has none",
        )
    return flat


def matched(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], what: str
) -> list[tuple[str, Tensor, Tensor]]:
    """(student's name, student's, teacher's): by name where the names are the same, else by depth.

    what: "hidden features", for the error. Raises WrongUse where one of them has none.
    """
    for who, shown in (("student", student), ("teacher", teacher)):
        if not shown:
            raise WrongUse(
                f"the {who} shows no {what}",
                "name the places: lighten.watch.pairs(student, teacher) finds them",
            )
    if student.keys() == teacher.keys():
        return [(name, x, teacher[name]) for name, x in student.items()]
    s, t = list(student.items()), list(teacher.values())
    return [(*s[i], t[j]) for i, j in by_depth(len(s), len(t))]


def by_depth(students: int, teachers: int) -> list[tuple[int, int]]:
    """Places of two networks that lie equally deep, the last of one with the last of the other.

    >>> by_depth(2, 6), by_depth(3, 2)
    ([(0, 2), (1, 5)], [(0, 0), (2, 1)])
    """
    count = min(students, teachers)

    def ends(of: int) -> list[int]:
        return [(i + 1) * of // count - 1 for i in range(count)]

    return list(zip(ends(students), ends(teachers), strict=True))


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """x at length 1 along a dimension; what is next to 0 stays short, so its gradient is finite."""
    return x * inverse_length(x.square().sum(dim, keepdim=True))


def inverse_length(square: Tensor) -> Tensor:
    """What vectors are multiplied by to have length 1, from their squared lengths; not endless for
    those next to 0."""
    return torch.rsqrt(square + 1e-4 * square.detach().mean() + 1e-12)


def one_of(loss: str, option: str, value: str, known: Sequence[str]) -> None:
    """Raises WrongUse where an option has a value that it cannot have."""
    if value not in known:
        near = difflib.get_close_matches(value, known, 1)
        guess = f"did you mean `{near[0]}`? " if near else ""
        raise WrongUse(f"`{loss}`: {option} `{value}`", f"{guess}known: {', '.join(known)}")


def within(loss: str, option: str, value: float, low: float, high: float) -> None:
    """Raises WrongUse where a number is not in low..high (NaN never is)."""
    if not low <= value <= high:
        raise WrongUse(f"`{loss}`: {option} is {value:g}", f"give {low:g} to {high:g}")


def aligned(
    name: str, student: Tensor, teacher: Tensor, channels: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Both as (batch, positions..., channels), sizes in space pooled to the smaller.

    channels: "first" (second dimension), "last", or "auto": first for 4 and 5 dimensions (images,
    volumes), else last (tokens, vectors). Raises WrongUse where batches or dimensions differ.
    """
    if student.dim() != teacher.dim() or len(student) != len(teacher) or student.dim() < 2:
        raise WrongUse(
            f"features at `{name}` are {tuple(student.shape)}, the teacher's"
            f" {tuple(teacher.shape)}",
            "both need as many dimensions and the same batch; name other places",
        )
    first = channels == "first" or (channels == "auto" and student.dim() in (4, 5))
    s, t = (x if first else x.movedim(-1, 1) for x in (student, teacher))
    if s.shape[2:] != t.shape[2:]:
        size = [min(a, b) for a, b in zip(s.shape[2:], t.shape[2:], strict=True)]
        s, t = _pooled(s, size), _pooled(t, size)
    return s.movedim(1, -1), t.movedim(1, -1)


def _pooled(x: Tensor, size: Sequence[int]) -> Tensor:
    """(batch, channels, *space) averaged to `size`."""
    if len(size) == 1:
        return F.adaptive_avg_pool1d(x, size[0])
    if len(size) == 2:
        return F.adaptive_avg_pool2d(x, (size[0], size[1]))
    if len(size) == 3:
        return F.adaptive_avg_pool3d(x, (size[0], size[1], size[2]))
    raise WrongUse(f"features {tuple(x.shape)} cannot be pooled", "name other places")


EMBEDDINGS = ("hidden", "outputs")


def embeddings(student: Seen, teacher: Seen, on: str) -> tuple[Tensor, Tensor]:
    """(batch, width) of both: the deepest hidden place, or the outputs; the mean over positions."""
    if on == "hidden":
        name, s, t = matched(student.hidden, teacher.hidden, "hidden features")[-1]
        return _vectors(s, s.dim() in (4, 5)), _same_batch(name, s, _vectors(t, t.dim() in (4, 5)))
    s = _vectors(student.outputs, False)
    return s, _same_batch("outputs", s, _vectors(teacher.outputs, False))


def _vectors(x: Tensor, first: bool) -> Tensor:
    return x.flatten(2).mean(2) if first else x.flatten(1, -2).mean(1) if x.dim() > 2 else x


def _same_batch(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    if len(student) != len(teacher):
        raise WrongUse(
            f"at `{name}` the student shows {len(student)} examples, the teacher {len(teacher)}",
            "both must see the same batch",
        )
    return teacher


def trained_part(loss: str, parts: nn.Module | None, name: str) -> nn.Module:
    """What `start` made for a loss; raises WrongUse where it is not there."""
    if isinstance(parts, nn.ModuleDict) and name in parts:
        return parts[name]
    raise WrongUse(
        f"`{loss}` has to train a projection here, and was given none",
        "parts = lesson.start(student, teacher), then lesson(student, teacher, labels, parts)",
    )
