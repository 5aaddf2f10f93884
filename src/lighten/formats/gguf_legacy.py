"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL: blocks of 32 weights that share one float16 scale.

    w = scale * level + min        (min only in the _1 types)

*Source:* llama.cpp, ggml-common.h (block_q4_0 ... block_q8_0, block_iq4_nl: layout and the 16
levels of IQ4_NL) and ggml-quants.c (dequantize_row_*: order of operations).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lighten.formats.gguf_iq4_xs import LEVELS, Table
from lighten.registry import formats
from lighten.scale_search import (
    HALF_MAX,
    Consecutive,
    Levels,
    Work,
    checked,
    half,
    moments,
    over_chunks,
    reciprocal,
    search_affine,
    search_scale,
)
from lighten.types import Grid, tensor_bytes

BLOCK = 32


@dataclass(frozen=True)
class Block32:
    """One of the six types. code_bits: 4, 5 or 8. has_min: w = scale * code + min, codes from 0.

    uneven: the 16 levels of IQ4_NL.
    """

    name: str
    code_bits: int
    has_min: bool = False
    uneven: bool = False
    block: int = BLOCK
    sub: int = BLOCK
    step: int = 1

    @property
    def top(self) -> int:
        """The level of the last code, likewise."""
        return (1 << self.code_bits) - 1 + self.low

    @property
    def low(self) -> int:
        """The level of code 0, for types whose levels are consecutive integers."""
        return 0 if self.has_min else -(1 << (self.code_bits - 1))

    def bits(self, columns: int) -> float:
        return self.code_bits + 16 * (2 if self.has_min else 1) / BLOCK

    def accepts(self, shape: tuple[int, int]) -> str | None:
        if shape[1] % BLOCK:
            return f"{self.name} stores blocks of {BLOCK} and rows of {shape[1]} are no multiple"
        return None

    # -- numbers -------------------------------------------------------------------------------
    def fit(self, w: Tensor, importance: Tensor | None = None) -> Grid:
        """scale (and min) (out, blocks); raises BadInput."""
        checked(self.name, w, importance, HALF_MAX * max(self.top, -self.low))
        search = self._line if self.has_min else self._ray
        tries = len(_CLIPS[self.code_bits] if self.has_min else _TRIES[self.name])
        found = over_chunks(search, w, importance, BLOCK, BLOCK, tries)
        shape = (w.shape[0], w.shape[1] // BLOCK)
        names = ("scale", "min") if self.has_min else ("scale",)
        return {name: t.view(shape) for name, t in zip(names, found, strict=True)}

    def _ray(self, x: Tensor, imp: Tensor) -> tuple[Tensor]:
        """Scales for x (32, blocks)."""
        scale = search_scale(x, imp, self._levels, _TRIES[self.name], 2, Work.like(x))
        return (half(scale),)

    def _line(self, x: Tensor, imp: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and mins for x (32, blocks); the min takes up what rounding the scale moves."""
        work, levels = Work.like(x), Consecutive(0, self.top)
        clips = _CLIPS[self.code_bits]
        scale, minus = search_affine(x, imp, levels, clips, 3, work, signed=True)
        scale = half(scale)
        inverse = reciprocal(scale)
        mo = moments(x, imp, inverse, minus * inverse, levels, work)
        minus = minus + scale * mo.first / imp.sum(0)
        flat = inverse == 0
        return scale, half(torch.where(flat, (imp * x).sum(0) / imp.sum(0), -minus))

    @property
    def _levels(self) -> Levels:
        return _TABLE if self.uneven else Consecutive(max(self.low, -127), self.top)

    def encode(self, w: Tensor, grid: Grid, start: int = 0) -> Tensor:
        inverse = _columns(reciprocal(grid["scale"]), start, w.shape[1])
        if self.has_min:
            w = w - _columns(grid["min"], start, w.shape[1])
        u = w * inverse
        if self.uneven:
            return _TABLE.code(u)
        low = max(self.low, -127)
        return u.round_().clamp_(low, self.top).sub_(self.low).to(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid, start: int = 0) -> Tensor:
        scale = _columns(grid["scale"], start, codes.shape[1])
        level = self.level(codes)
        level.mul_(scale)
        return level.add_(_columns(grid["min"], start, codes.shape[1])) if self.has_min else level

    def settle(self, part: str, value: Tensor) -> Tensor:
        return half(value)

    def refit(self, w: Tensor, grid: Grid, start: int, importance: Tensor | None = None) -> Grid:
        return grid  # nothing is shared beyond the block

    def level(self, codes: Tensor) -> Tensor:
        """Codes -> levels, float32."""
        if not self.uneven:
            return codes.float().add_(self.low)
        return _TABLE.level(codes)

    # -- bytes ---------------------------------------------------------------------------------
    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        rows, columns = codes.shape
        blocks = columns // BLOCK
        heads = [grid["scale"]] + ([grid["min"]] if self.has_min else [])
        head = [tensor_bytes(h.half().reshape(-1, 1)) for h in heads]
        c = codes.reshape(-1, BLOCK)
        if self.code_bits == 8:
            body = [(c ^ 128)]  # offset binary to two's complement
        else:
            nibble = c & 15
            body = [nibble[:, :16] | (nibble[:, 16:] << 4)]
            if self.code_bits == 5:
                place = torch.arange(8, dtype=torch.uint8, device=c.device)
                high = ((c >> 4).reshape(-1, 4, 8) << place).sum(-1).to(torch.uint8)
                body.insert(0, high)
        stored = torch.cat(head + body, 1)
        return {"bytes": stored.reshape(rows, blocks * stored.shape[1])}

    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Grid]:
        rows, columns = shape
        blocks = columns // BLOCK
        b = packed["bytes"].reshape(rows * blocks, -1)
        names = ("scale", "min") if self.has_min else ("scale",)
        grid = {}
        for i, name in enumerate(names):
            raw = b[:, 2 * i : 2 * i + 2].contiguous().view(torch.float16)
            grid[name] = raw.float().reshape(rows, blocks)
        b = b[:, 2 * len(names) :]
        if self.code_bits == 8:
            return (b ^ 128).reshape(shape), grid
        nibbles = b[:, -16:]
        codes = torch.cat([nibbles & 15, nibbles >> 4], 1)
        if self.code_bits == 5:
            place = torch.arange(8, dtype=torch.uint8, device=b.device)
            codes |= ((b[:, :4, None] >> place & 1) << 4).reshape(-1, BLOCK)
        return codes.reshape(shape), grid


def _columns(per_block: Tensor, start: int, count: int) -> Tensor:
    """One column per weight out of one per block."""
    if count == 1:
        return per_block[:, start // BLOCK, None]
    if start % BLOCK == 0 and count % BLOCK == 0:
        first = start // BLOCK
        return per_block[:, first : first + count // BLOCK].repeat_interleave(BLOCK, 1)
    index = torch.arange(start, start + count, device=per_block.device) // BLOCK
    return per_block[:, index]


# types without a min: levels on which the largest magnitude of a block may fall
_Q4 = torch.linspace(6.2, 9.2, 9).tolist()
_Q5 = torch.linspace(13.6, 17.2, 7).tolist()
_IQ4 = torch.linspace(95, 165, 12).tolist()
_TRIES = {
    "q4_0": _Q4 + [-t for t in _Q4],
    "q5_0": _Q5 + [-t for t in _Q5],
    "q8_0": torch.linspace(125.6, 128.2, 5).tolist(),
    "iq4_nl": _IQ4 + [-t for t in _IQ4],
}
# types with one: share of the range that the levels span, and share of the rest cut off below
_CLIPS = {
    4: [(f, t) for f in torch.linspace(0.78, 1.02, 5).tolist() for t in (0.0, 0.5, 1.0)],
    5: [(f, t) for f in torch.linspace(0.88, 1.02, 6).tolist() for t in (0.0, 0.5, 1.0)],
}
_TABLE = Table.of(LEVELS)

for _entry in (
    Block32("q4_0", 4),
    Block32("q4_1", 4, has_min=True),
    Block32("q5_0", 5),
    Block32("q5_1", 5, has_min=True),
    Block32("q8_0", 8),
    Block32("iq4_nl", 4, uneven=True),
):
    formats(_entry.name)(_entry)
