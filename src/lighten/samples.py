"""What a network is calibrated and measured on: inputs, and labels where there are any.

Images from disk, a tensor, an array, a DataLoader or any iterable of batches all become the same
three tensors, split once: what is measured on is never calibrated on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lighten.errors import BadInput, WrongUse
from lighten.loaders import (
    check_finite,
    is_dataset,
    known,
    length_of,
    pair_of,
    read_batches,
    read_dataset,
)

HELD_OUT = 2048
"""Most examples that are held out to measure on where no other data is given for it."""


@dataclass(frozen=True, eq=False)
class Samples:
    """calibration, held_out: (count, ...) as the network takes them. labels: (count,) of held_out.

    digest: sha256 in hex of all three. classes: their names, where they are known. normalised: mean
    and standard deviation that pixels in [0, 1] were normalised by, where that is known.
    """

    calibration: Tensor
    held_out: Tensor
    labels: Tensor | None
    source: str
    digest: str
    classes: tuple[str, ...] = ()
    normalised: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def split(count: int, calibration: int) -> tuple[int, int]:
    """How many of `count` examples to calibrate and to measure on.

    >>> split(50_000, 1024), split(250, 1024), split(3, 1024)
    ((1024, 2048), (100, 150), (1, 2))
    """
    first = max(1, min(calibration, int(0.4 * count)))
    return first, min(HELD_OUT, count - first)


def samples(
    data: Any, *, calibration: int = 1024, test: Any = None, source: str = "", seed: int = 0
) -> Samples:
    """Split `data`, or take `test` (of the same kind) to measure on.

    data: a tensor or array (count, ...), a pair of them (inputs, labels), lighten.images.Images, a
    torch Dataset, or an iterable of batches or of (batch, labels); one that ends before its length
    is damaged. Raises WrongUse, BadInput (too few, NaN).
    """
    if calibration < 1:
        raise WrongUse(f"{calibration} examples to calibrate on", "give at least 1")
    if test is not None:
        x, _ = gathered(data, calibration, seed)
        held, labels = gathered(test, None, seed)
    else:
        x, labels = gathered(data, calibration + HELD_OUT, seed)
        if len(x) < 2:
            raise BadInput(
                f"{source or 'the data'} has {len(x)} example",
                "two are needed, one of them to measure on",
            )
        first, rest = split(len(x), calibration)
        held = x[first : first + rest]
        labels = None if labels is None else labels[first : first + rest]
        x = x[:first]
    for name, part in (("calibrate", x), ("measure", held)):
        if not len(part):
            raise BadInput(f"there is no example to {name} on", "give more data")
        check_finite(part)
    if held.shape[1:] != x.shape[1:]:
        raise BadInput(
            f"examples to measure on are {tuple(held.shape[1:])}, to calibrate on"
            f" {tuple(x.shape[1:])}",
            "both must have one shape",
        )
    shown = data if test is None else test
    how = getattr(shown, "preparation", None)  # of lighten.images.Images
    labels = known(labels)
    return Samples(
        x, held, labels, source or _called(data), digest(x, held, labels),
        tuple(getattr(shown, "classes", ())), None if how is None else (how.mean, how.std),
    )  # fmt: skip


def gathered(data: Any, most: int | None, seed: int) -> tuple[Tensor, Tensor | None]:
    """Up to `most` inputs and their labels, in memory; sized data is drawn from as a whole."""
    if hasattr(data, "tensor") and hasattr(data, "labels"):  # lighten.images.Images
        index = draw(len(data), most, seed)
        return data.tensor(index), data.labels(index)
    if isinstance(data, tuple) and len(data) == 2 and not isinstance(data[0], tuple):
        x, y = pair_of(data)
        index = draw(len(x), most, seed)
        return x[index], y[index]
    if isinstance(data, Tensor) or hasattr(data, "__array__"):
        x = torch.as_tensor(data)
        return x[draw(len(x), most, seed)], None
    if is_dataset(data):
        return read_dataset(data, draw(length_of(data) or 0, most, seed))
    if not isinstance(data, Iterable):
        raise WrongUse(
            f"a {type(data).__name__} is no data",
            "give a tensor (count, ...), a DataLoader, an iterable of batches or a path",
        )
    return read_batches(data, most=most)


def draw(count: int, most: int | None, seed: int) -> Tensor:
    """Indices of up to `most` of `count` examples; seed 0 keeps the order."""
    if seed == 0:
        return torch.arange(count if most is None else min(count, most))
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:most]


def _called(data: Any) -> str:
    return str(getattr(data, "source", "") or f"a {type(data).__name__}")


def digest(*parts: Tensor | None) -> str:
    """sha256 in hex of shapes, types and values."""
    sha = hashlib.sha256()
    for part in parts:
        if part is not None:
            sha.update(f"{tuple(part.shape)}{part.dtype}".encode())
            sha.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
