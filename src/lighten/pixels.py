"""From an encoded picture to pixels of the size and the channels that a network takes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lighten.errors import BadInput, MissingPackage, WrongUse
from lighten.image_sources import Pixels

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

PRESETS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "half": ((0.5,), (0.5,)),
    "efficientnet-lite": ((127 / 255,), (128 / 255,)),
}
"""Name -> (mean, standard deviation) of a channel, of pixels in [0, 1]."""

_GREY = ("1", "L", "LA")
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_MOST = 1 << 27  # pixels of one picture

Statistic = str | float | Sequence[float] | None


@dataclass(frozen=True)
class Preparation:
    """What is done to each picture. size: of the square that comes out; None: as it is.

    crop: share of the shorter side that the square takes in its middle; None: the whole picture,
    squashed. channels: 1 or 3; None: as the first picture has. mean, std: one number a channel or
    one for all, in units of [0, 1].
    """

    size: int | None = None
    crop: float | None = 1.0
    channels: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @classmethod
    def of(
        cls,
        size: int | None,
        crop: str | float,
        channels: int | None,
        mean: Statistic,
        std: Statistic,
    ) -> Preparation:
        """Read what a user wrote; raises WrongUse.

        >>> Preparation.of(224, "0.875", 3, "half", None).mean
        (0.5,)
        """
        if size is not None and size < 1:
            raise WrongUse(f"images of side {size} cannot be", "--size 224")
        if channels not in (None, 1, 3):
            raise WrongUse(f"images of {channels} channels cannot be made", "1 or 3")
        share = _share(crop)
        if size is None and share != 1.0:
            raise WrongUse(f"crop `{crop}` needs a size", "--size 224")
        first, second = _statistic("mean", mean, 0), _statistic("std", std, 1)
        if first is None and second is None:
            return cls(size, share, channels)
        if isinstance(mean, str) and mean in PRESETS and second is None:
            second = PRESETS[mean][1]
        if isinstance(std, str) and std in PRESETS and first is None:
            first = PRESETS[std][0]
        if first is None or second is None:
            given, other = ("mean", "std") if second is None else ("std", "mean")
            raise WrongUse(f"--{given} is given without --{other}", f"one of {', '.join(PRESETS)}")
        for name, numbers in (("mean", first), ("std", second)):
            if channels is not None and len(numbers) not in (1, channels):
                raise WrongUse(f"--{name} has {len(numbers)} numbers for {channels} channels")
        return cls(size, share, channels, first, second)


def decode(content: bytes | Pixels, name: str, how: Preparation) -> Pixels:
    """Pixels (channels, h, w) of a picture, uint8; raises BadInput with its name, MissingPackage.

    Resized by cubic interpolation so that its shorter side is size / crop, then cut in the middle.
    """
    if isinstance(content, np.ndarray):
        if how.size in (None, content.shape[1]) and content.shape[1] == content.shape[2]:
            return _with_channels(content, how.channels)
        content = np.ascontiguousarray(content.transpose(1, 2, 0))
        picture = _pillow().fromarray(content[:, :, 0] if content.shape[2] == 1 else content)
    else:
        picture = _opened(content, name)
    grey = picture.mode in _GREY if how.channels is None else how.channels == 1
    picture = picture.convert("L" if grey else "RGB")
    if how.size is not None:
        picture = _resized(picture, how.size, how.crop)
    pixels = np.asarray(picture)
    planes: Pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return planes


def _opened(content: bytes, name: str) -> Picture:
    pillow = _pillow()
    try:
        picture: Picture = pillow.open(io.BytesIO(content))
        if picture.width * picture.height > _MOST:
            raise BadInput(f"{name} has {picture.width} x {picture.height} pixels", "is it whole?")
        picture.load()
    except BadInput:
        raise
    except Exception as error:  # each of Pillow's readers raises kinds of its own
        raise BadInput(
            f"{name} is no image that can be read: {error or type(error).__name__}",
            "remove it, or save it again",
        ) from error
    if picture.mode in _DEEP:
        raise BadInput(f"{name} has more than 8 bits a channel", "save it with 8")
    return picture


def _with_channels(pixels: Pixels, channels: int | None) -> Pixels:
    have = pixels.shape[0]
    if channels in (None, have):
        return pixels
    if have == 1:
        return np.repeat(pixels, 3, 0)
    # Pillow's weights for luminance, so that an array and a file give the same.
    weights = np.array([19595, 38470, 7471])[:, None, None]
    grey: Pixels = ((pixels * weights).sum(0, keepdims=True) + 0x8000) >> 16
    return grey.astype(np.uint8)


def _resized(picture: Picture, size: int, share: float | None) -> Picture:
    cubic = _pillow().Resampling.BICUBIC
    width, height = picture.size
    if share is None:
        return picture.resize((size, size), cubic)
    shorter = max(size, round(size / share))
    if width <= height:
        width, height = shorter, max(shorter, int(shorter * height / width))
    else:
        width, height = max(shorter, int(shorter * width / height)), shorter
    if picture.size != (width, height):
        picture = picture.resize((width, height), cubic)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return picture.crop((left, top, left + size, top + size))


def _share(crop: str | float) -> float | None:
    if crop == "squash":
        return None
    try:
        share = 1.0 if crop == "center" else float(crop)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise WrongUse(
            f"crop `{crop}` is not known",
            'center, squash, or the share of the shorter side that is kept, such as "0.875"',
        )
    return share


def _statistic(name: str, given: Statistic, which: int) -> tuple[float, ...] | None:
    """One number a channel, from numbers, text or a preset's name."""
    if given is None:
        return None
    if isinstance(given, str):
        if given in PRESETS:
            return PRESETS[given][which]
        words: Sequence[Any] = given.split(",")
    else:
        words = [given] if isinstance(given, int | float) else given
    hint = f"{', '.join(PRESETS)}, or numbers for pixels in [0, 1], such as 0.485,0.456,0.406"
    try:
        numbers = tuple(float(w) for w in words)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) not in (1, 3):
        raise WrongUse(f"--{name} `{given}` is neither one number nor three", hint)
    if which and not all(0 < n <= 1 for n in numbers):
        raise WrongUse(f"--std `{given}` is not in (0, 1]", hint)
    if not which and not all(0 <= n <= 1 for n in numbers):
        raise WrongUse(f"--mean `{given}` is not in [0, 1]", hint + "; divide pixels 0..255 by 255")
    return numbers


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingPackage(
            "images need the package `pillow`", "pip install lighten[images]"
        ) from error
    return Image
