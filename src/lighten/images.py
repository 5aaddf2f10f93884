"""Images to calibrate and measure on, decoded when they are asked for.

Decoded pixels stay in memory as uint8 up to a limit; what is above is decoded again each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lighten.errors import BadInput, WrongUse
from lighten.image_sources import Pixels, Source, open_source
from lighten.pixels import Preparation, Statistic, decode

_MEMORY = 1 << 29  # bytes of decoded pixels that stay in memory

Which = slice | Sequence[int] | Tensor | None


class _Store:
    """Pixels by row of the source, each prepared; the first ones stay in memory."""

    def __init__(self, source: Source, how: Preparation) -> None:
        self.source, self.how = source, how
        self._kept: dict[int, Pixels] = {}
        self._bytes = 0

    def pixels(self, rows: list[int]) -> Pixels:
        """(n, ...) of these rows: uint8 (n, channels, h, w), or a source's own floats."""
        found = {row: self._kept[row] for row in rows if row in self._kept}
        absent = [row for row in dict.fromkeys(rows) if row not in found]
        for row, content in self.source.read(absent):
            if isinstance(content, np.ndarray) and content.dtype != np.uint8:
                found[row] = content
                continue
            value = decode(content, self.source.name(row), self.how)
            found[row] = value
            if self._bytes + value.nbytes <= _MEMORY and isinstance(content, bytes):
                self._kept[row] = value
                self._bytes += value.nbytes
        for row in rows:
            self._fits(row, found[row])
        return np.stack([found[row] for row in rows])

    @cached_property
    def first(self) -> Pixels:
        """The first picture of the source, whose shape all others must have."""
        ((_, content),) = self.source.read([0])
        if isinstance(content, np.ndarray) and content.dtype != np.uint8:
            return content
        return decode(content, self.source.name(0), self.how)

    def _fits(self, row: int, pixels: Pixels) -> None:
        here, there = pixels.shape, self.first.shape
        if here == there:
            return
        names = f"{self.source.name(row)} and {self.source.name(0)}"
        if here[0] != there[0]:
            raise BadInput(
                f"{names} have {here[0]} and {there[0]} channels", "say which: channels 1 or 3"
            )
        sizes = " and ".join(f"{w} x {h}" for _, h, w in (here, there))
        raise BadInput(f"{names} have {sizes} pixels", "say what they become: --size 224")


@dataclass(frozen=True, eq=False)
class Images:
    """Some pictures of a source, in an order. source: as the user wrote it. classes: their names,
    empty where they have none. rows: (count,) int64, their places in the source."""

    source: str
    rows: Tensor = field(repr=False)
    classes: tuple[str, ...]
    preparation: Preparation
    store: _Store = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def count(self) -> int:
        """How many pictures."""
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of each."""
        return tuple(self.store.first.shape)

    @property
    def labelled(self) -> bool:
        """Whether the class of each is known."""
        return self.store.source.labels is not None

    def name(self, index: int) -> str:
        """What a message calls a picture: its file, or its row in a file."""
        return self.store.source.name(int(self.rows[index]))

    def tensor(self, which: Which = None) -> Tensor:
        """(n, channels, h, w) float32, (pixel / 255 - mean) / std; all of them unless told which.

        Raises BadInput for a picture that cannot be read or has another size, by its name.
        """
        return normalised(self.pixels(which), self.preparation.mean, self.preparation.std)

    def pixels(self, which: Which = None) -> Tensor:
        """(n, channels, h, w) uint8, before they are normalised; a source's own floats as they are.

        Raises BadInput as `tensor` does.
        """
        rows = self._rows(which)
        if not rows:
            return torch.empty(0, *self.shape, dtype=torch.uint8)
        return torch.from_numpy(np.ascontiguousarray(self.store.pixels(rows)))

    def labels(self, which: Which = None) -> Tensor | None:
        """(n,) int64, or None where they are not known; all of them unless told which."""
        labels = self.store.source.labels
        return None if labels is None else torch.from_numpy(labels[self._rows(which)])

    def batches(self, size: int = 64) -> Iterator[Tensor]:
        """All pictures in order, `size` at a time: (n, channels, h, w) as `tensor` gives them."""
        for start in range(0, len(self), size):
            yield self.tensor(slice(start, start + size))

    def split(self, calibration: int, held_out: int, seed: int = 0) -> tuple[Images, Images]:
        """Two disjoint sets drawn at random, the same for a seed; raises WrongUse for too many."""
        if calibration < 1 or held_out < 1 or calibration + held_out > len(self):
            raise WrongUse(
                f"{calibration} images to calibrate on and {held_out} to test on, of {len(self)}",
                "at least one of each, and no more than there are",
            )
        drawn = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        first, second = drawn[:calibration], drawn[calibration : calibration + held_out]
        return self._of(self.rows[first]), self._of(self.rows[second])

    @cached_property
    def digest(self) -> str:
        """sha256 in hex of these pictures as they lie there, their labels and preparation."""
        sha = hashlib.sha256(repr(self.preparation).encode())
        labels = self.store.source.labels
        for start in range(0, len(self), 256):
            rows = self.rows[start : start + 256].tolist()
            contents = dict(self.store.source.read(rows))
            for row in rows:
                content = contents[row]
                raw = content if isinstance(content, bytes) else content.tobytes()
                label = "" if labels is None else int(labels[row])
                sha.update(f"{label} {len(raw)} ".encode() + hashlib.sha256(raw).digest())
        return sha.hexdigest()

    def _of(self, rows: Tensor) -> Images:
        """The same with other rows, in file order where the source is read front to back."""
        ordered = rows if self.store.source.random else rows.sort().values
        return replace(self, rows=ordered)

    def _rows(self, which: Which) -> list[int]:
        if which is None:
            chosen = self.rows
        elif isinstance(which, slice):
            chosen = self.rows[which]
        else:
            index = torch.as_tensor(which, dtype=torch.long)
            if len(index) and not -len(self) <= int(index.min()) <= int(index.max()) < len(self):
                raise WrongUse(f"image {int(index.max())} of {len(self)} was asked for")
            chosen = self.rows[index]
        found: list[int] = chosen.tolist()
        return found


def normalised(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """x (n, channels, h, w) as float32, uint8 divided by 255, then (x - mean) / std.

    Raises WrongUse where mean or std has not one number, nor one for each channel.
    """
    x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    if mean == (0.0,) and std == (1.0,):
        return x
    for name, numbers in (("mean", mean), ("std", std)):
        if x.ndim < 2 or len(numbers) not in (1, x.shape[1]):
            raise WrongUse(
                f"--{name} has {len(numbers)} numbers, the images have {x.shape[1]} channels"
            )
    wide = (-1, *(1,) * (x.ndim - 2))
    return (x - torch.tensor(mean).view(wide)).div_(torch.tensor(std).view(wide))


def load_images(
    path: str | Path,
    *,
    size: int | None = None,
    mean: Statistic = None,
    std: Statistic = None,
    channels: int | None = None,
    crop: str | float = "center",
    limit: int | None = None,
    offset: int = 0,
    seed: int | None = 0,
) -> Images:
    """A folder for each class, a zip of such folders, Parquet, .npz, or a folder of loose images.

    size: side of the square that comes out. crop: "center", "squash", or the share of the shorter
    side that is kept ("0.875"). mean, std: for pixels in [0, 1], "0.485,0.456,0.406" or the name of
    a preset. channels: 1 or 3. limit, offset: of the order that `seed` draws, so that a few images
    are of all classes; seed None: the order of the files. What is drawn from Parquet above 256 MB
    stays in file order. Floats of a .npz are taken as they are. Raises UserError.
    """
    how = Preparation.of(size, crop, channels, mean, std)
    source = open_source(path)
    if offset < 0 or offset >= source.count or (limit is not None and limit < 1):
        wanted = "all" if limit is None else limit
        raise WrongUse(f"{wanted} images from number {offset} on, of {source.count}")
    if limit is not None and offset + limit > source.count:
        raise WrongUse(
            f"{path} has {source.count} images, {limit} from number {offset} on are asked for",
            f"at most {source.count - offset}",
        )
    if seed is None:
        order = torch.arange(source.count)
    else:
        order = torch.randperm(source.count, generator=torch.Generator().manual_seed(seed))
    stop = source.count if limit is None else offset + limit
    rows = order[offset:stop]
    images = Images(str(path), rows, source.classes, how, _Store(source, how))
    return images if seed is None else images._of(rows)
