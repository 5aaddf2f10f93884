"""What is learned from: examples by number, changed a little each time they are seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lighten.errors import BadInput, WrongUse
from lighten.images import Images, normalised
from lighten.loaders import known

AUGMENTATIONS = (
    "none", "flip", "crop+flip", "crop+flip+cutmix", "crop+both", "crop+both+cutmix",
)  # fmt: skip
PAD = 4
"""Pixels that an image is padded by on each side before it is cut out again."""

MIXED = 0.5
"""Share of a batch's images that get a part of another one, where they do at all."""


class Course(Protocol):
    """Examples 0 .. count - 1, which can be read in any order and again."""

    @property
    def count(self) -> int: ...

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Any, Tensor | None]:
        """Inputs and labels of these examples. Whatever is random comes from `generator`, which is
        the same whenever the same step of the same seed is made. Inputs are what the student and
        the teacher are called with: a tensor, or tuples, lists and dicts of them."""


class ImageCourse:
    """Images (count, channels, h, w), or other tensors where nothing is augmented.

    inputs: a tensor, uint8 (divided by 255, then normalised by mean and std when it is read) or
    floats as the network takes them; or lighten.images.Images, whose pixels are decoded when they
    are asked for and stay in memory as uint8 up to 512 MB. rows: which of them, in this order.
    augment: "crop+flip" (padded by 4 zeros, cut out at random, mirrored or not), "flip", "none",
    "crop+flip+cutmix" (about half of the images of a batch get a rectangle of another; such
    examples have no labels), "crop+both" and "crop+both+cutmix" (each image comes both as it is and
    mirrored, in the second half of a batch that is twice as large: one pass over the images is two
    over views); done before normalising. Raises WrongUse, BadInput.

    *Source:* of views beside each other Hoffer et al. 2020, "Augment your batch" (CVPR), section 3.
    """

    def __init__(
        self,
        inputs: Tensor | Images,
        labels: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        augment: str = "none",
        mean: tuple[float, ...] = (0.0,),
        std: tuple[float, ...] = (1.0,),
    ) -> None:
        if augment not in AUGMENTATIONS:
            raise WrongUse(f"augment is `{augment}`", f"known: {', '.join(AUGMENTATIONS)}")
        if isinstance(inputs, Images):
            mean, std = inputs.preparation.mean, inputs.preparation.std
            labels = inputs.labels() if labels is None else labels
        if labels is not None and len(labels) != len(inputs):
            raise BadInput(f"{len(inputs)} inputs and {len(labels)} labels", "give as many of both")
        dims = len(inputs.shape) + isinstance(inputs, Images)
        if augment != "none" and dims != 4:
            raise WrongUse(
                f"`{augment}` is for images (count, channels, height, width), the data has"
                f" {dims} dimensions",
                'augment="none"',
            )
        self.rows = torch.arange(len(inputs)) if rows is None else rows
        if not len(self.rows):
            raise BadInput("there is no example to learn from", "give more data")
        self._images = inputs if isinstance(inputs, Images) else None
        self._read: Callable[[Tensor], Tensor]
        self._read = inputs.pixels if isinstance(inputs, Images) else inputs.__getitem__
        self.labels, self.augment, self.mean, self.std = labels, augment, mean, std

    @property
    def count(self) -> int:
        return len(self.rows)

    def name(self, row: int) -> str:
        """What a message calls an input: its file, its row, or its place here."""
        return f"example {row}" if self._images is None else self._images.name(row)

    @property
    def mirrored(self) -> bool:
        """Whether images are mirrored at random: an image and its mirror image then mean the
        same."""
        return "flip" in self.augment or "both" in self.augment

    def check(self, needs: frozenset[str]) -> None:
        """Raises WrongUse for a lesson that needs labels where examples have none."""
        if "labels" not in needs:
            return
        if known(self.labels) is None:
            raise WrongUse("the lesson needs labels, the data has none", "learn from `logits`")
        if "cutmix" in self.augment:
            raise WrongUse(
                f"the lesson needs labels, and `{self.augment}` mixes images of different ones",
                'learn from `logits`, or augment by "crop+flip"',
            )

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        rows = self.rows[indices]
        x = augmented(self._read(rows), self.augment, generator)
        labels = None if self.labels is None or "cutmix" in self.augment else self.labels[rows]
        if labels is not None and "both" in self.augment:
            labels = torch.cat([labels, labels])
        raw = x.dtype == torch.uint8 or (self.mean, self.std) != ((0.0,), (1.0,))
        return normalised(x, self.mean, self.std) if raw else x, labels


def augmented(x: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """x (n, channels, h, w), images moved by up to PAD pixels, mirrored, mixed, as `how` says; 2n,
    the mirror images behind them, where they come as both."""
    if how == "none":
        return x
    n, _, h, w = x.shape
    rows, columns = torch.arange(h).expand(n, h), torch.arange(w).expand(n, w)
    if "crop" in how:
        x = F.pad(x, [PAD] * 4)
        moved = torch.randint(2 * PAD + 1, (2, n, 1), generator=generator)
        rows, columns = rows + moved[0], columns + moved[1]
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(n)[:, None, None]
    x = x[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if "cutmix" in how:
        # some of each batch, not all of some batches: batch norms then learn from the mixture that
        # their running statistics, which later normalise every image, describe
        chosen = torch.rand(n, 1, 1, 1, generator=generator) < MIXED
        x = torch.where(chosen, cutmix(x, generator), x)
    return torch.cat([x, x.flip(-1)]) if "both" in how else x


def cutmix(x: Tensor, generator: torch.Generator) -> Tensor:
    """x (n, channels, h, w), in each image a rectangle of another; its share is even in [0, 1].

    What a network says of such an image no label tells, but the teacher does.

    *Source:* Yun et al. 2019, "CutMix" (arXiv 1905.04899), equations 1 and 2, a rectangle and a
    partner for each image; for distillation: Beyer et al. 2022 (arXiv 2106.05237), section 3.
    """
    n, _, h, w = x.shape
    other = torch.randperm(n, generator=generator)
    side = torch.rand(n, 1, generator=generator).sqrt()  # of the rectangle, over the image's

    def inside(size: int) -> Tensor:
        """(n, size): which rows or columns the rectangle has, cut off at the image's edge."""
        middle = size * torch.rand(n, 1, generator=generator)
        return (torch.arange(size) + 0.5 - middle).abs() < size * side / 2

    within = inside(h)[:, None, :, None] & inside(w)[:, None, None, :]
    return torch.where(within, x[other], x)
