"""What a network recovers on: all examples that nothing is measured on, some of them held out.

The examples of a run that its result is measured on are never learned from, nor is the best state
chosen by them: a tenth of the others (at most 2048) is held out for that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lighten.course import ImageCourse
from lighten.errors import BadInput, WrongUse
from lighten.images import Images
from lighten.loaders import (
    check_classes,
    check_finite,
    is_dataset,
    known,
    pair_of,
    read_batches,
    read_dataset,
)
from lighten.samples import HELD_OUT, Samples, digest, draw, split

SAMPLED = 256
"""Images on disk that tell a data set from another: to read all may take longer than to learn."""

MOST = 4_000_000_000
"""Bytes of examples that are collected from an iterable at most."""


@dataclass(frozen=True, eq=False)
class TrainingData:
    """course: what is learned from. held_out (count, ...), labels (count,): what the best state is
    chosen by; labels None where there are none. digest: sha256 in hex of what is held out, of what
    is learned from (of images on disk: of SAMPLED of them), its labels and its order."""

    course: ImageCourse
    held_out: Tensor
    labels: Tensor | None
    source: str
    digest: str

    def check(self, classes: int, who: str = "network") -> None:
        """Raises BadInput where a label is no class of a network that has so many; says which."""
        source = self.source or "the data"
        check_classes(self.course.labels, classes, source, who, self.course.name)
        check_classes(self.labels, classes, f"{source}, held out", who)

    def check_against(self, output: Tensor) -> None:
        """The same for a network that gives this; numbers and segments have no classes to check."""
        if output.dim() == 2 and output.shape[1] > 1:
            self.check(output.shape[1])


def training_data(
    data: Any, *, calibration: int = 1024, tested: bool = False, seed: int = 0,
    augment: str = "auto", held_out: Any = None, source: str = "",
) -> TrainingData:  # fmt: skip
    """All of `data` but what lighten.samples.samples, asked in the same way, measures on.

    data: lighten.images.Images, a tensor (count, ...), a pair (inputs, labels), a torch Dataset or
    an iterable of batches, which `collected` reads. tested: other data was given to measure on.
    held_out: other data of these kinds to choose the best state by, up to 2048 examples of it; then
    all of `data` is learned from. Images stay encoded until they are asked for; augmented before
    they are normalised. augment: as ImageCourse has it, or "auto": "crop+flip" for images (count, 1
    or 3 channels, height, width), else "none". Raises UserError, for NaN too.
    """
    data = collected(data)
    inputs, labels = _pair(data)
    if isinstance(inputs, Tensor):
        check_finite(inputs)
    order = draw(len(inputs), None, seed)
    if not tested:
        first, rest = split(min(len(order), calibration + HELD_OUT), calibration)
        order = torch.cat([order[:first], order[first + rest :]])
    if len(order) < 2:
        raise BadInput(
            f"{source or 'the data'} has {len(order)} example to learn from",
            "two are needed, one of them to choose the best state by; give more data, or --test",
        )
    if held_out is None:
        held = min(HELD_OUT, len(order) // 10 or 1)
        order, rows = order[:-held], order[-held:]
        others = ImageCourse(inputs, labels, rows=rows)
    else:
        others = _others(collected(held_out), inputs)
    if augment == "auto":
        shape = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else inputs.shape
        augment = "crop+flip" if len(shape) == 3 and shape[0] in (1, 3) else "none"
    course = ImageCourse(inputs, labels, rows=order, augment=augment)
    x, y = others.batch(torch.arange(others.count), torch.Generator())
    found = digest(x, y, _known_by(inputs, order), labels, order)
    y = known(y)
    return TrainingData(course, x, y, source or str(getattr(data, "source", "")), found)


def of_samples(samples: Samples, augment: str = "none") -> TrainingData:
    """To learn from what was calibrated on, where there is nothing else."""
    return training_data(samples.calibration, tested=True, augment=augment, source=samples.source)


def collected(data: Any) -> Any:
    """Data that can be drawn from by number: batches of an iterable, and the examples of a torch
    Dataset, are read, once, into memory.

    Raises NoRoom above 4 GB, BadInput without a batch and for what lighten.loaders refuses.
    """
    if _is_images(data) or isinstance(data, Tensor):
        return data
    if isinstance(data, tuple) and len(data) == 2 and not isinstance(data[0], tuple):
        return pair_of(data)
    if is_dataset(data):
        return _joined(read_dataset(data, room=MOST))
    if hasattr(data, "__array__"):
        return torch.as_tensor(data)
    if not isinstance(data, Iterable):
        raise WrongUse(
            f"a {type(data).__name__} is no data",
            "give a tensor (count, ...), a DataLoader, an iterable of batches or a path",
        )
    return _joined(read_batches(data, room=MOST))


def _joined(found: tuple[Tensor, Tensor | None]) -> Any:
    x, y = found
    return x if y is None else (x, y)


def _others(data: Any, inputs: Any) -> ImageCourse:
    """Up to HELD_OUT examples of other data; raises BadInput where they are of another shape."""
    x, y = _pair(data)
    shapes = [tuple(p.shape[1:] if isinstance(p, Tensor) else p.shape) for p in (x, inputs)]
    if shapes[0] != shapes[1]:
        raise BadInput(
            f"examples that are held out are {shapes[0]}, those to learn from {shapes[1]}",
            "both must have one shape",
        )
    if isinstance(x, Tensor):
        check_finite(x)
    found = ImageCourse(x, y)
    found.rows = found.rows[:HELD_OUT]
    return found


def _known_by(inputs: Tensor | Images, rows: Tensor) -> Tensor:
    """What tells inputs from others: all of a tensor, evenly spread ones of images on disk."""
    if isinstance(inputs, Tensor):
        return inputs
    return inputs.pixels(rows[:: max(1, len(rows) // SAMPLED)])


def _pair(data: Any) -> tuple[Any, Tensor | None]:
    """Inputs and labels of what `collected` gives."""
    if isinstance(data, tuple):
        return data
    return data, data.labels() if _is_images(data) else None


def _is_images(data: Any) -> bool:
    return isinstance(data, Images)
