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

from lighten.errors import BadInput
from lighten.registry import formats
from lighten.rounding import fit_scale, fit_scale_min, half
from lighten.types import Grid, tensor_bytes

BLOCK = 32
IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Block32:
    """One of the six types. code_bits: 4, 5 or 8; has_min: w = scale * code + min, codes from 0."""

    name: str
    code_bits: int
    has_min: bool = False
    levels: tuple[int, ...] | None = None
    block: int = BLOCK
    sub: int = BLOCK
    step: int = 1

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
    def nearest(self, x: Tensor) -> Tensor:
        """The nearest level to each x, which is in units of the scale."""
        if self.levels is None:
            high = (1 << self.code_bits) - 1 + self.low
            return x.round().clamp_(max(self.low, -127), high)
        table = torch.tensor(self.levels, dtype=x.dtype, device=x.device)
        return table[_bucket(x, table)]

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Grid:
        if not torch.isfinite(w).all():
            raise BadInput(f"{self.name} cannot store NaN or infinite weights", "mend the model")
        x = w.reshape(-1, BLOCK)
        if importance is None:
            weight = torch.ones_like(x)
        else:
            weight = importance.to(x).expand(w.shape).reshape(-1, BLOCK)
            # a block that no calibration input reaches is fitted as if all its columns counted
            weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, torch.ones_like(weight))
        shape = (w.shape[0], w.shape[1] // BLOCK)
        if self.has_min:
            top = (1 << self.code_bits) - 1
            tries = top + torch.linspace(-0.25 * top**0.5, 1.0, 14)
            scale, minimum = fit_scale_min(x, weight, top, tries)
            scale = half(scale)
            code = ((x - minimum[:, None]) / torch.where(scale == 0, 1e-30, scale)[:, None]).round()
            code.clamp_(0, top)  # the min takes up what rounding the scale has moved
            total = weight.sum(1)
            minimum = (weight * (x - scale[:, None] * code)).sum(1) / total
            return {"scale": scale.view(shape), "min": half(minimum).view(shape)}
        return {"scale": fit_scale(x, weight, self.nearest, self._tries()).view(shape)}

    def _tries(self) -> Tensor:
        """Levels that the largest magnitude of a block may be put on."""
        if self.levels is not None:
            tries = torch.linspace(95, 165, 15)
        else:
            top = 1 << (self.code_bits - 1)
            spread = 0.55 * top**0.5
            tries = torch.linspace(top - 0.3 - spread, top + 0.4 + 0.3 * spread, 12)
            if self.code_bits == 8:
                return torch.linspace(125.5, 128.5, 7)
        return torch.cat([tries, -tries])

    def encode(self, w: Tensor, grid: Grid, start: int = 0) -> Tensor:
        scale = _columns(grid["scale"], start, w.shape[1])
        safe = torch.where(scale == 0, torch.full_like(scale, 1e-30), scale)
        if self.has_min:
            x = (w - _columns(grid["min"], start, w.shape[1])) / safe
            return x.round_().clamp_(0, (1 << self.code_bits) - 1).to(torch.uint8)
        x = torch.where(scale == 0, torch.zeros_like(w), w / safe)
        if self.levels is not None:
            table = torch.tensor(self.levels, dtype=x.dtype, device=x.device)
            return _bucket(x, table).to(torch.uint8)
        return (self.nearest(x) - self.low).to(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid, start: int = 0) -> Tensor:
        scale = _columns(grid["scale"], start, codes.shape[1])
        if self.has_min:
            return scale * codes.float() + _columns(grid["min"], start, codes.shape[1])
        return scale * self.level(codes)

    def settle(self, part: str, value: Tensor) -> Tensor:
        return half(value)

    def refit(self, w: Tensor, grid: Grid, start: int, importance: Tensor | None = None) -> Grid:
        return grid  # nothing is shared beyond the block

    def level(self, codes: Tensor) -> Tensor:
        """Codes -> levels, float32."""
        if self.levels is None:
            return codes.float() + self.low
        return torch.tensor(self.levels, device=codes.device, dtype=torch.float32)[codes.long()]

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


def _bucket(x: Tensor, table: Tensor) -> Tensor:
    return torch.bucketize(x, (table[1:] + table[:-1]) / 2)


for _entry in (
    Block32("q4_0", 4),
    Block32("q4_1", 4, has_min=True),
    Block32("q5_0", 5),
    Block32("q5_1", 5, has_min=True),
    Block32("q8_0", 8),
    Block32("iq4_nl", 4, levels=IQ4_NL_LEVELS),
):
    formats(_entry.name)(_entry)
