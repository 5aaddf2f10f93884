"""Which examples each step learns from: a course in an order of its own each epoch, or a loader.

A step's examples depend on (seed, step) alone, so that a training that was stopped goes on as if it
had not been.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from lighten.course import Course
from lighten.errors import BadInput, WrongUse
from lighten.loaders import length_of
from lighten.seeds import generator, seed_of

Batch = tuple[Any, Tensor | None]


class Feed(Protocol):
    """Batches by step. per_epoch: steps in an epoch, None where that is not known."""

    @property
    def per_epoch(self) -> int | None: ...

    def at(self, step: int) -> list[Batch]:
        """The parts of this step's batch whose gradients are added up; raises BadInput."""


def feed_of(
    data: Course | Iterable[Any], batch: int, accumulate: int, seed: int, rank: int, ranks: int
) -> Feed:
    """The feed of a course, or of an iterable of batches (a DataLoader); raises WrongUse.

    batch: examples a step, over all processes and parts; a loader has its own. rank: which of
    `ranks` processes this is: each takes its share of every batch.
    """
    if hasattr(data, "batch") and hasattr(data, "count"):
        return CourseFeed(cast(Course, data), batch, accumulate, seed, rank, ranks)
    if not isinstance(data, Iterable):
        raise WrongUse(
            f"a {type(data).__name__} cannot be learned from",
            "give a course, a DataLoader or an iterable of (inputs, labels)",
        )
    if ranks > 1:
        raise WrongUse(
            "an iterable of batches cannot be shared among processes", "give a course (ImageCourse)"
        )
    return LoaderFeed(data, accumulate, seed)


class CourseFeed:
    """A course, shuffled anew each epoch. What does not fill a batch at an epoch's end is left
    out: other examples each time."""

    def __init__(
        self, course: Course, batch: int, accumulate: int, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        if batch < ranks * accumulate or accumulate < 1:
            raise WrongUse(
                f"a batch of {batch} cannot be split into {accumulate} parts on {ranks} processes",
                "a larger batch, or fewer parts",
            )
        if course.count < batch:
            raise WrongUse(
                f"a batch has {batch} examples, the data {course.count}",
                "a smaller batch, or more data",
            )
        self.course, self.size, self.accumulate, self.seed = course, batch, accumulate, seed
        self.rank, self.ranks = rank, ranks
        self._order: tuple[int, Tensor] | None = None

    @property
    def per_epoch(self) -> int:
        return self.course.count // self.size

    def at(self, step: int) -> list[Batch]:
        epoch, place = divmod(step, self.per_epoch)
        if self._order is None or self._order[0] != epoch:
            drawn = torch.randperm(
                self.course.count, generator=generator(self.seed, "order", epoch)
            )
            self._order = (epoch, drawn)
        whole = self._order[1][place * self.size : (place + 1) * self.size]
        chance = generator(self.seed, "change", step, self.rank)
        parts = whole[self.rank :: self.ranks].chunk(self.accumulate)
        return [self.course.batch(part, chance) for part in parts]


class LoaderFeed:
    """Batches as a DataLoader or another iterable gives them, gone through again each epoch.

    Without a length, an epoch ends where the iterable does. One that ends before the length that it
    has, or that gives nothing when it is gone through again, is an error. To go on after a stop,
    the batches that were seen are read again and passed over.
    """

    def __init__(self, loader: Iterable[Any], accumulate: int, seed: int) -> None:
        self.loader, self.accumulate, self.seed = loader, accumulate, seed
        self.length = length = length_of(loader)
        if accumulate < 1 or (length is not None and length < accumulate):
            raise WrongUse(
                f"{accumulate} batches a step cannot be had of {length}", "fewer, or more data"
            )
        self.per_epoch: int | None = None if length is None else length // accumulate
        self._epoch, self._next = -1, 0
        self._batches: Iterator[Any] = iter(())

    def at(self, step: int) -> list[Batch]:
        if self.per_epoch is not None:
            epoch = step // self.per_epoch
            if epoch != self._epoch:
                self._begin(epoch)
                self._next = epoch * self.per_epoch
        while True:
            found = self._read()
            self._next += 1
            if self._next > step:
                return found

    def _read(self) -> list[Batch]:
        """The next step's batches. Whatever is random in them (a transform) depends on the step:
        after a stop, those that are passed over take nothing from the one that is wanted."""
        state = torch.get_rng_state()
        torch.manual_seed(seed_of(self.seed, "change", self._next))
        try:
            return self._step()
        finally:
            torch.set_rng_state(state)

    def _begin(self, epoch: int) -> None:
        # a shuffling loader draws its order from torch's own generator, when it gives its first
        state = torch.get_rng_state()
        torch.manual_seed(seed_of(self.seed, "order", epoch))
        rest = iter(self.loader)
        self._epoch, self._batches = epoch, chain(list(islice(rest, 1)), rest)
        torch.set_rng_state(state)

    def _step(self) -> list[Batch]:
        """The batches of the next step; without a length, those of the next epoch at its end."""
        for again in (self.per_epoch is None, False):
            found: list[Batch] = []
            for item in self._batches:
                found.append(_pair(item))
                if len(found) == self.accumulate:
                    return found
            if not again:
                break
            self._begin(self._epoch + 1)
        promised = "" if self.length is None else f", it said it had {self.length}"
        raise BadInput(
            f"the data ended at step {self._next} (pass {self._epoch + 1} over it){promised}",
            "give what can be gone through more than once: a DataLoader, a list or tensors",
        )


def _pair(item: Any) -> Batch:
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    if isinstance(item, tuple | list) and len(item) == 1:
        return item[0], None
    return item, None
