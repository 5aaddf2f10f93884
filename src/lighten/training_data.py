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
from lighten.errors import BadInput, NoRoom
from lighten.images import Images
from lighten.samples import HELD_OUT, Samples, batch_of, digest, draw, split

MOST = 4_000_000_000
"""Bytes of examples that are collected from an iterable at most."""


@dataclass(frozen=True, eq=False)
class TrainingData:
    """course: what is learned from. held_out (count, ...), labels (count,): what the best state is
    chosen by; labels None where there are none. digest: sha256 in hex of what is held out and
    of which are learned from."""

    course: ImageCourse
    held_out: Tensor
    labels: Tensor | None
    source: str
    digest: str


def training_data(
    data: Any, *, calibration: int = 1024, tested: bool = False, seed: int = 0,
    augment: str = "auto", held_out: Any = None, source: str = "",
) -> TrainingData:  # fmt: skip
    """All of `data` but what lighten.samples.samples, asked in the same way, measures on.

    data: lighten.images.Images, a tensor (count, ...), a pair (inputs, labels) or an iterable of
    batches that `collected` has read. tested: other data was given to measure on. held_out: other
    data of these kinds to choose the best state by, up to 2048 examples of it; then all of `data`
    is learned from. Images stay encoded until they are asked for; augmented before they are
    normalised. augment: as ImageCourse has it, or "auto": "crop+flip" for images (count, 1 or 3
    channels, height, width), else "none". Raises UserError.
    """
    data = collected(data)
    inputs, labels = _pair(data)
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
        others = ImageCourse(*_pair(collected(held_out)))
        others.rows = others.rows[:HELD_OUT]
    if augment == "auto":
        shape = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else inputs.shape
        augment = "crop+flip" if len(shape) == 3 and shape[0] in (1, 3) else "none"
    course = ImageCourse(inputs, labels, rows=order, augment=augment)
    x, y = others.batch(torch.arange(others.count), torch.Generator())
    found = digest(x, y, course.rows)
    return TrainingData(course, x, y, source or str(getattr(data, "source", "")), found)


def of_samples(samples: Samples, augment: str = "none") -> TrainingData:
    """To learn from what was calibrated on, where there is nothing else."""
    return training_data(samples.calibration, tested=True, augment=augment, source=samples.source)


def collected(data: Any) -> Any:
    """Data that can be drawn from by number: batches of an iterable are read, once, into memory.

    Raises NoRoom above 4 GB, BadInput without a batch.
    """
    if _is_images(data) or isinstance(data, Tensor):
        return data
    if isinstance(data, tuple) and len(data) == 2 and not isinstance(data[0], tuple):
        return torch.as_tensor(data[0]), torch.as_tensor(data[1])
    if hasattr(data, "__array__") or not isinstance(data, Iterable):
        return torch.as_tensor(data)
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    size = 0
    for item in data:
        x, y = batch_of(item)
        xs.append(x)
        if y is not None:
            ys.append(y)
        size += x.numel() * x.element_size()
        if size > MOST:
            raise NoRoom(
                f"the batches of a {type(data).__name__} hold more than {MOST / 1e9:.0f} GB",
                "give a path of images, which are read when they are needed",
            )
    if not xs:
        raise BadInput("the data has no batch", "give at least one")
    x = torch.cat(xs)
    return (x, torch.cat(ys)) if len(ys) == len(xs) else x


def _pair(data: Any) -> tuple[Any, Tensor | None]:
    """Inputs and labels of what `collected` gives."""
    if isinstance(data, tuple):
        return data
    return data, data.labels() if _is_images(data) else None


def _is_images(data: Any) -> bool:
    return isinstance(data, Images)
