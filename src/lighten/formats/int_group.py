"""Integers of 2, 3, 4, 7 or 8 bits in groups along the row, one float16 scale (and zero) each.

    w = scale * (code - zero)      symmetric (_sym): zero = 2^(bits-1), not stored

int4_g128: groups of 128 columns. int4_channel: one group per row. Codes and zero points are packed
bit by bit, little-endian, row by row. int7_channel_sym is for processors that add two products of
u8 and s8 in 16 bits, where 8-bit weights overflow: 2 * 255 * 64 still fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lighten.registry import formats
from lighten.scale_search import (
    HALF_MAX,
    Consecutive,
    Moments,
    Work,
    checked,
    half,
    moments_of_each,
    over_chunks,
    reciprocal,
    refit_scale,
    squared_error,
)
from lighten.types import Grid


@dataclass(frozen=True)
class IntGroup:
    """One width, group size (0: the whole row) and symmetry. apart: see lighten.sparse."""

    name: str
    code_bits: int
    block: int
    symmetric: bool
    step: int = 1
    apart: str = "codes"

    @property
    def sub(self) -> int:
        return self.block

    @property
    def high(self) -> int:
        return (1 << self.code_bits) - 1

    @property
    def middle(self) -> int:
        return 1 << (self.code_bits - 1)

    def bits(self, columns: int) -> float:
        groups = columns // (self.block or columns)
        size = _packed(columns, self.code_bits) + 2 * groups
        if not self.symmetric:
            size += _packed(groups, self.code_bits)
        return 8 * size / columns

    def accepts(self, shape: tuple[int, int]) -> str | None:
        if self.block and shape[1] % self.block:
            return (
                f"{self.name} needs rows of a multiple of {self.block} columns;"
                f" these have {shape[1]} ({shape[1] % self.block} too many)"
            )
        return None

    # -- numbers -------------------------------------------------------------------------------
    def fit(self, w: Tensor, importance: Tensor | None = None) -> Grid:
        """Scale (out, groups), and zero alike; raises BadInput."""
        checked(self.name, w, importance, HALF_MAX * self.middle)
        k = self.block or w.shape[1]
        scale, zero = over_chunks(
            self._search, w, importance, k, k, 3 * len(_SHARES[self.code_bits])
        )
        shape = (w.shape[0], w.shape[1] // k)
        grid = {"scale": scale.view(shape)}
        return grid if self.symmetric else grid | {"zero": zero.view(shape)}

    def _search(self, x: Tensor, imp: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero (groups,) for x (k, groups)."""
        work, w_sum = Work.like(x), imp.sum(0)
        shares = torch.tensor(_SHARES[self.code_bits], device=x.device)[:, None] / self.high
        if self.symmetric:
            peak = x.abs().amax(0)
            zero = torch.full_like(peak, self.middle)
            plain = peak / (self.middle - 1)
            shifts = torch.zeros(1, 1, device=x.device)
            width = 2 * peak
        else:
            low = x.amin(0).clamp_(max=0)
            width = x.amax(0).clamp_(min=0) - low
            plain = width / self.high
            zero = (-low * reciprocal(plain)).clamp_(0, self.high).round_()
            shifts = torch.tensor([[0.0], [-1.0], [1.0]], device=x.device)

        def best_of(s: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """The best refit of all pairs s (tries, groups), z + shifts, and its error."""
            zs = (z + shifts).clamp_(0, self.high)
            zs, s = zs.repeat(len(s), 1), s.repeat_interleave(len(shifts), 0)
            s, e = refit_scale(s, self._moments(x, imp, w_sum, s, zs, work))
            e, at = e.masked_fill_(s <= 0, torch.inf).min(0)
            return s.gather(0, at[None])[0], zs.gather(0, at[None])[0], e

        s, z, e = best_of(width * shares, zero)
        for _ in range(2):
            s_new, z_new, e_new = best_of(s[None], z)
            better = e_new < e
            s, z = torch.where(better, s_new, s), torch.where(better, z_new, z)
            e = torch.where(better, e_new, e)
        # what counts is the error with the scale as it is stored
        s, plain = half(s), half(plain)
        found = torch.isfinite(e) & (
            self._error(x, imp, s, z, work) <= self._error(x, imp, plain, zero, work)
        )
        return torch.where(found, s, plain), torch.where(found, z, zero)

    def _moments(
        self, x: Tensor, imp: Tensor, w_sum: Tensor, s: Tensor, z: Tensor, work: Work
    ) -> Moments:
        """Sums over levels code - zero; s, z (tries, groups)."""
        if self.symmetric:
            levels = Consecutive(-self.middle, self.middle - 1)
            return moments_of_each(x, imp, reciprocal(s), None, levels, work)
        mo = moments_of_each(x, imp, reciprocal(s), z, Consecutive(0, self.high), work)
        square = (mo.square + z * (z * w_sum - 2 * mo.total)).clamp_(min=0)
        return replace(mo, cross=mo.cross - z * mo.first, square=square)

    def _error(self, x: Tensor, imp: Tensor, s: Tensor, z: Tensor, work: Work) -> Tensor:
        e = squared_error(x, imp, reciprocal(s), z, Consecutive(0, self.high), work) * s * s
        return torch.where(s == 0, (imp * x * x).sum(0), e)

    def encode(self, w: Tensor, grid: Grid, start: int = 0) -> Tensor:
        inverse = self._columns(reciprocal(grid["scale"]), start, w.shape[1])
        code = (w * inverse).add_(self._zero(grid, start, w.shape[1])).round_()
        return code.clamp_(0, self.high).to(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid, start: int = 0) -> Tensor:
        level = codes.float().sub_(self._zero(grid, start, codes.shape[1]))
        return level.mul_(self._columns(grid["scale"], start, codes.shape[1]))

    def settle(self, part: str, value: Tensor) -> Tensor:
        return half(value) if part == "scale" else value.round().clamp_(0, self.high)

    def _zero(self, grid: Grid, start: int, count: int) -> Tensor | float:
        return self.middle if self.symmetric else self._columns(grid["zero"], start, count)

    def _columns(self, per_group: Tensor, start: int, count: int) -> Tensor:
        """One column per weight out of one per group (or one for all)."""
        k = self.block
        if k == 0:
            return per_group[:, :1]
        first, last = start // k, (start + count - 1) // k
        if first == last:
            return per_group[:, first : first + 1]
        here = per_group[:, first : last + 1].repeat_interleave(k, 1)
        return here[:, start - first * k : start - first * k + count]

    # -- bytes ---------------------------------------------------------------------------------
    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        """codes (out, bytes), scale (out, groups) float16, zero (out, bytes)."""
        packed = {"codes": self.pack_codes(codes), "scale": grid["scale"].half()}
        if not self.symmetric:
            packed["zero"] = pack_bits(grid["zero"].to(torch.uint8), self.code_bits)
        return packed

    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Grid]:
        grid = {"scale": packed["scale"].float()}
        if not self.symmetric:
            groups = shape[1] // (self.block or shape[1])
            grid["zero"] = unpack_bits(packed["zero"], self.code_bits, groups).float()
        return self.unpack_codes(packed["codes"], shape[1]), grid

    def pack_codes(self, codes: Tensor) -> Tensor:
        return pack_bits(codes, self.code_bits)

    def unpack_codes(self, packed: Tensor, n: int) -> Tensor:
        return unpack_bits(packed, self.code_bits, n)


def _packed(count: int, bits: int) -> int:
    return (count * bits + 7) // 8


def _word(size: int) -> torch.dtype:
    """An integer type that holds so many bytes and a sign."""
    return torch.int32 if size < 4 else torch.int64


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """(out, n) uint8 < 2^bits -> (out, ceil(n * bits / 8)), the first code in the lowest bits."""
    if bits == 8:
        return codes.contiguous()
    rows, n = codes.shape
    per, size = (8 // bits, 1) if 8 % bits == 0 else (8, bits)  # codes that fill whole bytes
    kind = _word(size)
    padded = torch.nn.functional.pad(codes, (0, -n % per)).view(rows, -1, per).to(kind)
    word = torch.zeros(padded.shape[:2], dtype=kind, device=codes.device)
    for i in range(per):
        word |= padded[..., i] << (bits * i)
    parts = [(word >> (8 * i) & 255).to(torch.uint8) for i in range(size)]
    return torch.stack(parts, -1).view(rows, -1)[:, : _packed(n, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of pack_bits: (out, n) uint8."""
    if bits == 8:
        return packed[:, :n].contiguous()
    rows = packed.shape[0]
    per, size = (8 // bits, 1) if 8 % bits == 0 else (8, bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % size)).view(rows, -1, size)
    kind = _word(size)
    word = torch.zeros(padded.shape[:2], dtype=kind, device=packed.device)
    for i in range(size):
        word |= padded[..., i].to(kind) << (8 * i)
    parts = [(word >> (bits * i) & ((1 << bits) - 1)).to(torch.uint8) for i in range(per)]
    return torch.stack(parts, -1).view(rows, -1)[:, :n].contiguous()


# shares of the range that the levels may span: fewer bits gain more from clipping
_SHARES = {
    2: [0.35 + 0.08 * i for i in range(10)],
    3: [0.5 + 0.06 * i for i in range(10)],
    4: [0.6 + 0.05 * i for i in range(9)],
    7: [0.84 + 0.04 * i for i in range(5)],
    8: [0.88 + 0.03 * i for i in range(5)],
}

for _bits in (2, 3, 4, 8):
    for _group in (32, 64, 128, 0):
        for _symmetric in (False, True):
            _name = f"int{_bits}_{f'g{_group}' if _group else 'channel'}"
            _name += "_sym" if _symmetric else ""
            formats(_name)(IntGroup(_name, _bits, _group, _symmetric))
formats("int7_channel_sym")(IntGroup("int7_channel_sym", 7, 0, True))
