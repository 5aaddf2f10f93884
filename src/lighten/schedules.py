"""How much is gone at which step of a training: cubic, linear, iterative, all at once.

    schedule = Schedule(last=0.9, start=100, end=1000, every=100)
    schedule.at(550)                     # the share that is gone after step 550

*Source:* Zhu & Gupta 2017, "To prune, or not to prune", equation 1 (cubic); Frankle & Carbin 2019,
"The lottery ticket hypothesis", section 2 (iterative: of what is left, the same share each time).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lighten.errors import UnknownName, WrongUse

Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None


@runtime_checkable
class Stepped(Protocol):
    """What a loop calls after every step of its optimizer, and keeps in its checkpoints."""

    def step(self, step: int, optimizer: Optimizers = None) -> None:
        """step: how many steps the optimizer has made. Before gradients are set to zero."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and text: `torch.load(weights_only=True)` reads them back."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; raises WrongUse where it was made by another request."""


def cubic(t: float, first: float, last: float) -> float:
    """last + (first - last) (1 - t)³: most goes early, when the network can still mend itself."""
    return last + (first - last) * (1 - t) ** 3


def linear(t: float, first: float, last: float) -> float:
    """The same at every update."""
    return first + (last - first) * t


def iterative(t: float, first: float, last: float) -> float:
    """1 - (1 - first)¹⁻ᵗ (1 - last)ᵗ: of what is left, the same share at every update."""
    return float(1 - (1 - first) ** (1 - t) * (1 - last) ** t)


def one_shot(t: float, first: float, last: float) -> float:
    """All at the first update."""
    return last


SHAPES: Mapping[str, Callable[[float, float, float], float]] = {
    "cubic": cubic,
    "linear": linear,
    "iterative": iterative,
    "one-shot": one_shot,
}
"""(how far the way is gone, in [0, 1]; first; last) -> the share that is gone."""


@dataclass(frozen=True)
class Schedule:
    """From `first` to `last`, changed at steps start, start + every, ... and end.

    Raises WrongUse for an end before its start and shares outside [0, 1) or falling, UnknownName
    for a shape that is none of SHAPES.

    >>> schedule = Schedule(last=0.875, start=10, end=30, every=10)
    >>> [schedule.at(n) for n in (9, 10, 19, 20, 30, 99)]
    [0.0, 0.0, 0.0, 0.765625, 0.875, 0.875]
    """

    last: float
    start: int
    end: int
    every: int = 1
    shape: str = "cubic"
    first: float = 0.0

    def __post_init__(self) -> None:
        if self.start < 0 or self.end < self.start:
            raise WrongUse(
                f"a schedule from step {self.start} to step {self.end} cannot be",
                "start is at least 0, end not before start",
            )
        if self.every < 1:
            raise WrongUse(f"an update every {self.every} steps cannot be", "at least 1")
        if not 0 <= self.first <= self.last < 1:
            raise WrongUse(
                f"a share from {self.first:g} to {self.last:g} cannot be pruned",
                "shares are at least 0, below 1 and do not fall",
            )
        if self.shape not in SHAPES:
            near = difflib.get_close_matches(self.shape, SHAPES, 1)
            guess = f"did you mean `{near[0]}`? " if near else ""
            raise UnknownName(
                f"unknown schedule `{self.shape}`", f"{guess}known: {', '.join(SHAPES)}"
            )

    @property
    def updates(self) -> int:
        """How often the share is set."""
        return 1 + math.ceil((self.end - self.start) / self.every)

    def due(self, step: int) -> int:
        """How many of the updates are at or before a step."""
        if step < self.start:
            return 0
        return self.updates if step >= self.end else 1 + (step - self.start) // self.every

    def at(self, step: int) -> float:
        """The share that is gone after a step."""
        due = self.due(step)
        if due == 0:
            return self.first
        point = min(self.start + (due - 1) * self.every, self.end)
        way = 1.0 if point == self.end else (point - self.start) / (self.end - self.start)
        return SHAPES[self.shape](way, self.first, self.last)

    def points(self) -> Iterator[tuple[int, float]]:
        """(step, share) of every update."""
        for n in range(self.updates):
            step = min(self.start + n * self.every, self.end)
            yield step, self.at(step)


@dataclass
class Clock:
    """Where a training is: the last step, and how many updates of its schedule were made."""

    schedule: Schedule
    step: int = -1
    done: int = 0

    def tick(self, step: int) -> bool:
        """Go to a step; whether an update is due there. Raises WrongUse for a step backwards."""
        if step < self.step:
            raise WrongUse(
                f"step {step} comes after step {self.step}",
                "count optimizer steps over all epochs; to resume, load_state_dict first",
            )
        self.step = step
        due, before = self.schedule.due(step), self.done
        self.done = max(due, before)
        return due > before

    def finished(self) -> None:
        """Raises WrongUse where the last update was not made."""
        if self.done < self.schedule.updates:
            raise WrongUse(
                f"training stopped at step {self.step}, pruning ends at step {self.schedule.end}",
                f"step({self.schedule.end}) prunes the rest at once; or set an earlier end",
            )


def put_back(name: str, masked: Tensor) -> None:
    """Raise WrongUse where what is masked of a weight is not zero."""
    if bool(masked.any()):
        raise WrongUse(
            f"`{name}` is not zero where it is masked: it was changed after the last step",
            "call step after every optimizer step, and keep no state from before `done`",
        )


def same_request(kind: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise WrongUse where a saved state was made by another request."""
    other = [k for k in own if saved.get(k) != own[k]]
    if other:
        raise WrongUse(
            f"this state of {kind} was saved with "
            + ", ".join(f"{k}={saved.get(k)!r} (here {own[k]!r})" for k in other),
            "make the object with the same options, then load",
        )
