"""What student and teacher show of a batch while one learns: outputs, and what the lesson needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lighten.errors import WrongUse
from lighten.lesson import Lesson, Parts, Seen
from lighten.mirrored import looking
from lighten.watch import Watch, others_of, outputs_of, pairs, watch


class Showing:
    """Student and teacher as a lesson sees them; `close` takes the hooks away."""

    def __init__(
        self,
        student: nn.Module,
        teacher: Callable[[Any], Any] | None,
        lesson: Lesson,
        inputs: Any,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """inputs: a batch, to find places of the same size by. Raises WrongUse."""
        self.lesson, self.teacher, self.autocast = lesson, teacher, autocast
        self._stack = ExitStack()
        self._places: list[tuple[str, str]] = []
        self._within = ""
        hidden, attention = "hidden" in lesson.needs, "attention" in lesson.needs
        if isinstance(teacher, nn.Module):
            looks, self._within = looking(teacher)
            if hidden:
                found = pairs(student, looks, inputs, ends=lesson.ends)
                self._places = [(ours, self._within + theirs) for ours, theirs in found]
        shown = list(dict.fromkeys(s for s, _ in self._places))
        self.student = self._stack.enter_context(watch(student, shown, attention))
        self._of_teacher: Watch | None = None
        if isinstance(teacher, nn.Module):
            seen = list(dict.fromkeys(t for _, t in self._places))
            self._of_teacher = self._stack.enter_context(watch(teacher, seen, attention))
        self.module = Shown(student, self.student)

    def parts(self, inputs: Any, seed: int) -> Parts:
        """What the lesson trains beside the student; neither network is changed."""
        modes = {part: part.training for part in self.module.modules()}
        set_mode(self.module, False)
        with torch.no_grad(), self.autocast():
            seen = self.student(inputs)
        for part, mode in modes.items():
            part.training = mode
        return self.lesson.start(seen, self.taught(inputs), seed)

    @torch.no_grad()
    def taught(self, inputs: Any) -> Seen | None:
        """What the teacher shows; None where there is none or the lesson does not look at it."""
        if self.teacher is None or not self.lesson.taught:
            return None
        with self.autocast():
            if self._of_teacher is None:
                found = self.teacher(inputs)
                if isinstance(found, Seen):
                    return found
                return Seen(outputs_of(found), others=others_of(found))
            seen = self._of_teacher(inputs)
        # by the student's names, in its order
        return replace(
            seen,
            hidden={s: seen.hidden[t] for s, t in self._places},
            attention={n.removeprefix(self._within): x for n, x in seen.attention.items()},
        )

    def close(self) -> None:
        self._stack.close()


class Shown(nn.Module):
    """The student as a module that returns what it shows, so that DDP sees all of it used; own
    tensors, no views, which FSDP could not follow through a change in place."""

    def __init__(self, student: nn.Module, see: Watch) -> None:
        super().__init__()
        self.student, self.see, self.spread = student, see, False

    def forward(self, inputs: Any) -> dict[str, Any]:
        seen = self.see(inputs)
        shown = {"outputs": seen.outputs, "hidden": dict(seen.hidden),
                 "attention": dict(seen.attention), "others": tuple(seen.others)}  # fmt: skip
        if not self.spread:
            return shown
        own: dict[str, Any] = tree_map_only(
            Tensor, lambda x: x.clone() if x._is_view() else x, shown
        )
        return own


def set_mode(module: nn.Module, training: bool) -> None:
    """As `train` and `eval` do it, which graphs of torch.export refuse."""
    for part in module.modules():
        part.training = training


def tensors_in(inputs: Any) -> list[Tensor]:
    """The tensors of a batch's inputs; raises WrongUse where there are none."""
    found = [x for x in tree_leaves(dict(inputs) if isinstance(inputs, Mapping) else inputs)
             if isinstance(x, Tensor)]  # fmt: skip
    if not found:
        raise WrongUse(f"a batch is a {type(inputs).__name__} without tensors", "give tensors")
    return found


def channels_last(module: nn.Module, inputs: Any) -> bool:
    """Lay images' weights out with channels last, as convolutions are fastest on CPU and CUDA.

    Returns whether that was done: not without images, and not where a forward asks for the other
    layout (a view over channels and places).
    """
    images = [x for x in tensors_in(inputs) if x.ndim == 4]
    if not images or images[0].device.type not in ("cpu", "cuda"):
        return False
    weights = [p for p in module.parameters() if p.ndim == 4]
    if not weights:
        return False
    modes = {part: part.training for part in module.modules()}
    set_mode(module, False)
    lay_out(module, torch.channels_last)
    try:
        with torch.no_grad():
            few = torch.utils._pytree.tree_map_only(Tensor, lambda x: laid_out(x[:2]), inputs)
            _call(module, few)
    except RuntimeError:
        lay_out(module, torch.contiguous_format)
        return False
    finally:
        for part, mode in modes.items():
            part.training = mode
    return True


def lay_out(module: nn.Module, how: torch.memory_format) -> None:
    """Weights of four dimensions in this layout; the parameters stay the same objects."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=how)


def laid_out(x: Tensor) -> Tensor:
    """Images with their channels last in memory; other tensors as they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _call(module: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple | list) else module(inputs)
