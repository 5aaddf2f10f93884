"""Integers of 2, 3, 4 or 8 bits in groups along the row, one float16 scale (and zero) each.

    w = scale * (code - zero)      symmetric (_sym): zero = 2^(bits-1), not stored

int4_g128: groups of 128 columns. int4_channel: one group per row. Codes and zero points are packed
bit by bit, little-endian, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lighten.registry import formats
from lighten.scale_search import (
    Work,
    checked,
    moments,
    over_chunks,
    reciprocal,
    refit_scale,
    squared_error,
)
from lighten.types import Grid

_HALF_MAX = 65504.0


@dataclass(frozen=True)
class IntGroup:
    """One width, group size (0: the whole row) and symmetry."""

    name: str
    code_bits: int
    block: int
    symmetric: bool
    step: int = 1

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
        checked(self.name, w, importance, _HALF_MAX * self.middle)
        k = self.block or w.shape[1]
        scale, zero = over_chunks(self._search, w, importance, k, k)
        shape = (w.shape[0], w.shape[1] // k)
        grid = {"scale": scale.view(shape)}
        return grid if self.symmetric else grid | {"zero": zero.view(shape)}

    def _search(self, x: Tensor, imp: Tensor) -> tuple[Tensor, Tensor]:
        work = Work.like(x)
        if self.symmetric:
            peak = x.abs().amax(0)
            plain = peak / (self.middle - 1), torch.full_like(peak, self.middle)
            shifts: tuple[int, ...] = (0,)
            width = 2 * peak
        else:
            low = x.amin(0).clamp_(max=0)
            width = x.amax(0).clamp_(min=0) - low
            # the largest scale that a float16 holds may be too small for a range on one side of 0
            plain = width / self.high, torch.round(-low * self.high * reciprocal(width))
            plain = plain[0], plain[1].clamp_(0, self.high)
            shifts = (-1, 0, 1)
        best, error = plain, self._error(x, imp, *plain, work)
        first = plain[1]

        def offer(s: Tensor, z: Tensor) -> None:
            nonlocal best, error
            inverse = reciprocal(s)
            # moments are over levels; r is the same, levels here are code - zero
            mo = moments(x, imp, inverse, None, _Shifted(z, self.high), work)
            s, e = refit_scale(s, mo)
            better = (e < error) & (s > 0)
            best = torch.where(better, s, best[0]), torch.where(better, z, best[1])
            error = torch.where(better, e, error)

        for share in _SHARES[self.code_bits]:
            for shift in shifts:
                offer(width * (share / self.high), (first + shift).clamp(0, self.high))
        for _ in range(2):
            start = best
            for shift in shifts:
                offer(start[0], (start[1] + shift).clamp(0, self.high))
        # what counts is the error with the scale as it is stored
        found, plain = (_half(best[0]), best[1]), (_half(plain[0]), plain[1])
        worse = self._error(x, imp, *found, work) > self._error(x, imp, *plain, work)
        return torch.where(worse, plain[0], found[0]), torch.where(worse, plain[1], found[1])

    def _error(self, x: Tensor, imp: Tensor, s: Tensor, z: Tensor, work: Work) -> Tensor:
        error = squared_error(x, imp, reciprocal(s), None, _Shifted(z, self.high), work) * s * s
        if bool((s == 0).any()):
            error = torch.where(s == 0, (imp * x * x).sum(0), error)
        return error

    def settle(self, part: str, value: Tensor) -> Tensor:
        return _half(value) if part == "scale" else value.round().clamp_(0, self.high)

    def refit(self, w: Tensor, grid: Grid, start: int, importance: Tensor | None = None) -> Grid:
        return grid  # nothing is shared beyond the group

    def encode(self, w: Tensor, grid: Grid, start: int = 0) -> Tensor:
        inverse = self._columns(reciprocal(grid["scale"]), start, w.shape[1])
        code = (w * inverse).add_(self._zero(grid, start, w.shape[1])).round_()
        return code.clamp_(0, self.high).to(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid, start: int = 0) -> Tensor:
        level = codes.float().sub_(self._zero(grid, start, codes.shape[1]))
        return level.mul_(self._columns(grid["scale"], start, codes.shape[1]))

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
        packed = {"codes": pack_bits(codes, self.code_bits), "scale": grid["scale"].half()}
        if not self.symmetric:
            packed["zero"] = pack_bits(grid["zero"].to(torch.uint8), self.code_bits)
        return packed

    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Grid]:
        grid = {"scale": packed["scale"].float()}
        if not self.symmetric:
            groups = shape[1] // (self.block or shape[1])
            grid["zero"] = unpack_bits(packed["zero"], self.code_bits, groups).float()
        return unpack_bits(packed["codes"], self.code_bits, shape[1]), grid


@dataclass(frozen=True)
class _Shifted:
    """Codes 0..high seen from the zero point of each group: levels -zero..high - zero."""

    zero: Tensor
    top: int

    def snap(self, u: Tensor, out: Tensor) -> None:
        torch.round(u, out=out)
        torch.clamp(out, -self.zero, self.top - self.zero, out=out)


def _half(t: Tensor) -> Tensor:
    return t.clamp(-_HALF_MAX, _HALF_MAX).half().float()


def _packed(count: int, bits: int) -> int:
    return (count * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """(out, n) uint8 < 2^bits -> (out, ceil(n * bits / 8)), the first code in the lowest bits."""
    if bits == 8:
        return codes.contiguous()
    rows, n = codes.shape
    per, size = (8 // bits, 1) if 8 % bits == 0 else (8, bits)  # codes that fill whole bytes
    padded = torch.nn.functional.pad(codes, (0, -n % per)).view(rows, -1, per).to(torch.int32)
    word = torch.zeros(padded.shape[:2], dtype=torch.int32, device=codes.device)
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
    word = torch.zeros(padded.shape[:2], dtype=torch.int32, device=packed.device)
    for i in range(size):
        word |= padded[..., i].to(torch.int32) << (8 * i)
    parts = [(word >> (bits * i) & ((1 << bits) - 1)).to(torch.uint8) for i in range(per)]
    return torch.stack(parts, -1).view(rows, -1)[:, :n].contiguous()


# shares of the range that the levels may span: fewer bits gain more from clipping
_SHARES = {
    2: [0.35 + 0.06 * i for i in range(14)],
    3: [0.45 + 0.05 * i for i in range(13)],
    4: [0.55 + 0.05 * i for i in range(11)],
    8: [0.85 + 0.03 * i for i in range(6)],
}

for _bits in (2, 3, 4, 8):
    for _group in (32, 64, 128, 0):
        for _symmetric in (False, True):
            _name = f"int{_bits}_{f'g{_group}' if _group else 'channel'}"
            _name += "_sym" if _symmetric else ""
            formats(_name)(IntGroup(_name, _bits, _group, _symmetric))
