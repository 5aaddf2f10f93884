"""IQ4_XS: super-blocks of 256, 6-bit scales over sub-blocks of 32, the 16 uneven IQ4_NL levels.

    w = (d * scale) * level

*Source:* llama.cpp, ggml-common.h (block_iq4_xs, kvalues_iq4nl), ggml-quants.c
(dequantize_row_iq4_xs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lighten.formats import gguf_k_pack as layout
from lighten.formats.gguf_k import Packed, SuperBlock
from lighten.registry import formats
from lighten.super_block import Search
from lighten.types import Grid

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Table:
    """The nearest of uneven whole levels, looked up by half steps (midpoints lie on them)."""

    codes: Tensor  # (512,) uint8: the code for all u in [(i - 256) / 2, (i - 255) / 2)
    levels: Tensor  # (512,) its level
    points: Tensor  # (codes,) the level of each code

    @classmethod
    def of(cls, levels: tuple[int, ...]) -> Table:
        points = torch.tensor(levels, dtype=torch.float32)
        cells = (torch.arange(512) - 256) / 2 + 0.25
        codes = torch.bucketize(cells, (points[1:] + points[:-1]) / 2)
        return cls(codes.to(torch.uint8), points[codes], points)

    def snap(self, u: Tensor, out: Tensor) -> None:
        torch.index_select(self.levels.to(u.device), 0, _cell(u), out=out.view(-1))

    def code(self, u: Tensor) -> Tensor:
        """Nearest codes, uint8, shaped as u."""
        return torch.index_select(self.codes.to(u.device), 0, _cell(u)).view_as(u)

    def level(self, codes: Tensor) -> Tensor:
        """Levels of codes, float32, shaped as codes."""
        # index_select takes a third of the time of points[codes]
        found = torch.index_select(self.points.to(codes.device), 0, codes.int().reshape(-1))
        return found.view_as(codes)


def _cell(u: Tensor) -> Tensor:
    return (u * 2).add_(256).clamp_(0, 511).to(torch.int32).view(-1)


def _join(codes: Tensor, g: Grid) -> Tensor:
    scale = layout.six_bit_iq4_xs((g["scale"] + 32).to(torch.uint8))
    return torch.cat([layout.halves(g["d"].reshape(-1)), scale, layout.planes(codes, 4, 16)], 1)


def _split(b: Tensor) -> Packed:
    scale = layout.un_six_bit_iq4_xs(b[:, 2:8]).float() - 32
    return layout.unplanes(b[:, 8:], 4, 16), {"d": layout.un_halves(b[:, :2])[0], "scale": scale}


_TRIES = torch.linspace(95, 160, 10).tolist()
_PEAKS = torch.linspace(26, 33, 15).tolist()
_SEARCH = Search(
    8,
    Table.of(LEVELS),
    -32,
    31,
    0,
    _TRIES + [-t for t in _TRIES],
    _PEAKS + [-t for t in _PEAKS],
)

formats("iq4_xs")(SuperBlock("iq4_xs", 32, 136, _SEARCH, 127, _join, _split))
