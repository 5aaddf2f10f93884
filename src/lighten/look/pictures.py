"""Examples of a network as small pictures that stand in a page themselves."""

from __future__ import annotations

import base64
import struct
import zlib

import torch
from torch import Tensor
from torch.nn.functional import interpolate

SIDE = 96
"""Pixels of the longer side, at most."""

_LEAST = 4
"""Pixels of the shorter side below which numbers are taken for no picture."""

Normalised = tuple[tuple[float, ...], tuple[float, ...]]


def are_pictures(shape: torch.Size | tuple[int, ...]) -> bool:
    """Whether examples of this shape are: (1 or 3 channels, height, width).

    >>> are_pictures((3, 32, 32)), are_pictures((16, 40))
    (True, False)
    """
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) >= _LEAST


def picture(example: Tensor, normalised: Normalised | None) -> str:
    """An example (channels, height, width) as a data URI of a PNG.

    normalised: mean and standard deviation to undo. Where what comes out are no pixels in [0, 1],
    darkest becomes black and brightest white.
    """
    x = example.detach().float().cpu()
    if normalised is not None:
        mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in normalised)
        x = x * std + mean
    low, high = float(x.min()), float(x.max())
    if low < -0.01 or high > 1.01:
        x = (x - low) / max(high - low, 1e-12)
    longer = max(x.shape[1:])
    if longer > SIDE:
        height, width = (max(1, round(side * SIDE / longer)) for side in x.shape[1:])
        x = interpolate(x[None], size=(height, width), mode="area")[0]
    pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8)
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode("ascii")


def png(pixels: Tensor) -> bytes:
    """(1 or 3, height, width) uint8 as a PNG file.

    *Source:* Portable Network Graphics, third edition, W3C 2025: sections 5.3 and 11.2.
    """
    channels, height, width = pixels.shape
    rows = pixels.permute(1, 2, 0).reshape(height, width * channels)
    filtered = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), rows], 1)  # filter type None
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    data = zlib.compress(filtered.numpy().tobytes(), 9)
    parts = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    checked = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checked
