"""Weights with zeros that are not stored: which may go (patterns), and the bytes of the others.

A sparse weight is a format with its codes kept for some positions only:

    mask     (out, ceil(in / 8)) uint8, one bit a position, the first lowest; 1: it stays
    codes    the base format's codes of what stays, row by row in one piece
    scale..  the base format's grid, as it is

Base formats are those whose codes lie apart from their scales (`apart` names that part, and
`pack_codes`, `unpack_codes` read and write it): floats and the integer groups. The grid of a
sparse weight has one more entry, "mask": (out, in) bool.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lighten.checked import finite
from lighten.errors import BadInput, WrongUse
from lighten.registry import formats
from lighten.types import Compressed, Grid, Spec, Stats

SPAN = 128
"""Columns that a sweep decides on together, where the pattern does not say."""


class Pattern(Protocol):
    """Which positions may go.

    span: columns that must be decided together. far: what stays of them depends on how all columns
    to their right score, too.
    """

    @property
    def span(self) -> int: ...

    @property
    def far(self) -> bool: ...

    def accepts(self, shape: tuple[int, int]) -> str | None:
        """None, or why weights of this shape cannot be sparse so."""

    def kept(self, columns: int) -> float:
        """The share that stays in rows of `columns`, as expected."""

    def choose(self, score: Tensor, before: Tensor | None = None) -> Tensor:
        """What stays, (out, k) bool, for score (out, k), the higher the more it should.

        before (out, j): what was decided to stay of the j columns to the left.
        """


@dataclass(frozen=True)
class Share:
    """A share of all weights goes: exactly round(share * size), of the lowest score."""

    share: float
    span: int = SPAN
    far: bool = True

    def accepts(self, shape: tuple[int, int]) -> str | None:
        return None

    def kept(self, columns: int) -> float:
        return 1 - self.share

    def choose(self, score: Tensor, before: Tensor | None = None) -> Tensor:
        size, gone = score.numel(), 0
        if before is not None:
            size += before.numel()
            gone = before.numel() - int(before.count_nonzero())
        flat = score.reshape(-1)
        remove = min(max(round(self.share * size) - gone, 0), len(flat))
        if remove == 0:
            return torch.ones_like(score, dtype=torch.bool)
        limit = flat.kthvalue(remove).values
        stays = flat > limit
        ties = (flat == limit).nonzero().flatten()
        missing = len(flat) - remove - int(stays.count_nonzero())
        stays[ties[len(ties) - missing :]] = True
        return stays.view(score.shape)


@dataclass(frozen=True)
class OfEach:
    """n of each m neighbours in a row stay."""

    n: int
    m: int
    far: bool = False

    @property
    def span(self) -> int:
        return self.m

    def accepts(self, shape: tuple[int, int]) -> str | None:
        if shape[1] % self.m:
            return f"{self.n}:{self.m} needs rows of a multiple of {self.m}, not {shape[1]} columns"
        return None

    def kept(self, columns: int) -> float:
        return self.n / self.m

    def choose(self, score: Tensor, before: Tensor | None = None) -> Tensor:
        groups = score.reshape(score.shape[0], -1, self.m)
        order = groups.argsort(dim=-1, descending=True, stable=True)
        stays = torch.zeros_like(groups, dtype=torch.bool)
        return stays.scatter_(-1, order[..., : self.n], True).view(score.shape)


@dataclass(frozen=True)
class Above:
    """What scores above a threshold stays."""

    threshold: float
    span: int = SPAN
    far: bool = False

    def accepts(self, shape: tuple[int, int]) -> str | None:
        return None

    def kept(self, columns: int) -> float:
        return 1.0  # known only when the weight is: at most this

    def choose(self, score: Tensor, before: Tensor | None = None) -> Tensor:
        return score > self.threshold


@dataclass(frozen=True, eq=False)
class Given:
    """What stays is known: mask (out, in) bool."""

    mask: Tensor
    span: int = SPAN
    far: bool = False

    def accepts(self, shape: tuple[int, int]) -> str | None:
        return None

    def kept(self, columns: int) -> float:
        return float(self.mask.double().mean())

    def choose(self, score: Tensor, before: Tensor | None = None) -> Tensor:
        start = 0 if before is None else before.shape[1]
        return self.mask[:, start : start + score.shape[1]]


def pattern_of(text: str) -> Share | OfEach | Above:
    """Read "0.5", "2:4" or "t0.01"; raises WrongUse.

    >>> pattern_of("2:4")
    OfEach(n=2, m=4, far=False)
    """
    hint = 'write "0.5" (the share that goes), "2:4" (2 of 4 stay) or "t0.01" (a threshold)'
    if not isinstance(text, str):
        raise WrongUse(f"sparsity {text!r} is no text", hint)
    try:
        if ":" in text:
            n, m = (int(part) for part in text.split(":"))
            if 0 < n < m:
                return OfEach(n, m)
        elif text.startswith("t"):
            return Above(float(text[1:]))
        elif 0 < float(text) < 1:
            return Share(float(text))
    except ValueError:
        pass
    raise WrongUse(f"sparsity `{text}` cannot be", hint)


@dataclass(frozen=True)
class Sparse:
    """A format (lighten.types.Format) of which only some codes are stored."""

    base: Any
    sparsity: str

    @classmethod
    def of(cls, spec: Spec) -> Sparse:
        """The format of a spec such as int4_g128+2:4; raises WrongUse where there is none."""
        if spec.format is None:
            raise WrongUse(
                f"spec `{spec}` does not say what the weights that stay are stored as",
                f"name a format: `f32+{spec}`",
            )
        base = formats[spec.format]
        if not hasattr(base, "apart"):
            raise WrongUse(
                f"{spec.format} mixes codes and scales in blocks, which have no room for a mask",
                "sparse weights can be f32, f16, bf16 and the int formats",
            )
        pattern_of(str(spec.sparsity))
        return cls(base, str(spec.sparsity))

    @property
    def name(self) -> str:
        return f"{self.base.name}+{self.sparsity}"

    @property
    def pattern(self) -> Share | OfEach | Above:
        return pattern_of(self.sparsity)

    @property
    def block(self) -> int:
        return int(self.base.block)

    @property
    def sub(self) -> int:
        return int(self.base.sub)

    @property
    def step(self) -> int:
        return int(self.base.step)

    def bits(self, columns: int) -> float:
        """Expected: the packed codes of a whole weight end on a byte."""
        codes: int = self.base.code_bits
        dense = 8 * math.ceil(columns * codes / 8) / columns
        mask = 8 * math.ceil(columns / 8) / columns
        return float(self.base.bits(columns)) - dense + mask + codes * self.pattern.kept(columns)

    def accepts(self, shape: tuple[int, int]) -> str | None:
        why: str | None = self.base.accepts(shape)
        return why or self.pattern.accepts(shape)

    # -- numbers -------------------------------------------------------------------------------
    def fit(self, w: Tensor, importance: Tensor | None = None) -> Grid:
        """What stays is what would cost the most: w² * importance."""
        square = w.square()
        score = square if importance is None else square * importance
        return self.fit_kept(w, self.pattern.choose(score), importance)

    def fit_kept(self, w: Tensor, kept: Tensor, importance: Tensor | None = None) -> Grid:
        """The grid for the weights that stay, kept (out, n) bool."""
        return fit_kept(self.base, w, kept, importance) | {"mask": kept}

    def encode(self, w: Tensor, grid: Grid, start: int = 0) -> Tensor:
        codes: Tensor = self.base.encode(w, _bare(grid), start)
        return codes

    def decode(self, codes: Tensor, grid: Grid, start: int = 0) -> Tensor:
        kept = grid["mask"][:, start : start + codes.shape[1]]
        dense: Tensor = self.base.decode(codes, _bare(grid), start)
        return dense.masked_fill(~kept, 0)

    def settle(self, part: str, value: Tensor) -> Tensor:
        settled: Tensor = self.base.settle(part, value)
        return settled

    def refit(self, w: Tensor, grid: Grid, start: int, importance: Tensor | None = None) -> Grid:
        return grid  # no base format has a part of its grid that stands alone

    # -- bytes ---------------------------------------------------------------------------------
    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        kept = grid["mask"]
        parts: dict[str, Tensor] = self.base.pack(codes, _bare(grid))
        parts[self.base.apart] = self.base.pack_codes(codes[kept][None])[0]
        return parts | {"mask": pack_mask(kept)}

    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Grid]:
        """Raises BadInput where mask and codes do not fit each other."""
        kept = unpack_mask(packed["mask"], shape[1])
        flat, count = packed[self.base.apart], int(kept.count_nonzero())
        if kept.shape[0] != shape[0] or len(flat) != (count * self.base.code_bits + 7) // 8:
            raise BadInput(
                f"a sparse weight of {shape[0]} x {shape[1]} has {len(flat)} bytes of codes for"
                f" {count} positions in its mask",
                "the file is damaged: write it again",
            )
        values = self.base.unpack_codes(flat[None], count).reshape(-1)
        codes = values.new_zeros(shape)
        codes[kept] = values
        whole = {**packed, self.base.apart: self.base.pack_codes(codes)}
        codes, grid = self.base.unpack(whole, shape)
        return codes, {**grid, "mask": kept}

    def compressed(self, codes: Tensor, grid: Grid, spec: Spec) -> Compressed:
        """The weight of these codes (out, in) and this grid."""
        format: Any = self
        shape = (codes.shape[0], codes.shape[1])
        return Compressed(spec, shape, format, self.pack(codes, grid))

    def take(
        self, packed: Mapping[str, Tensor], shape: tuple[int, int], index: Tensor
    ) -> dict[str, Tensor]:
        codes, grid = self.unpack(packed, shape)
        return self.pack(codes[index], {k: g[index] for k, g in grid.items()})


def format_of(spec: Spec) -> Any:
    """The format that a spec's weight is stored in, sparse or not."""
    return formats[str(spec.format)] if spec.sparsity is None else Sparse.of(spec)


def nearest(w: Tensor, kept: Tensor, fmt: Sparse, stats: Stats | None, spec: Spec) -> Compressed:
    """w (out, in) where kept, rounded to nearest on scales searched with columns as diag(H) says.

    Raises BadInput for NaN.
    """
    finite(fmt.name, w)
    importance = None if stats is None else stats.hessian.diagonal().clamp(min=0)
    grid = fmt.fit_kept(w, kept, importance)
    return fmt.compressed(fmt.encode(w, grid), grid, spec)


def fit_kept(fmt: Any, w: Tensor, kept: Tensor, importance: Tensor | None = None) -> Grid:
    """The base format's grid for what stays: what goes costs nothing, whatever the scale."""
    weights = kept.to(w.dtype) if importance is None else kept * importance
    grid: Grid = fmt.fit(w * kept, weights)
    return grid


def pinned(fmt: Any, codes: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """Codes and grid without its mask: what does not stay has the code that stands for 0."""
    if "mask" not in grid:
        return codes, grid
    bare = _bare(grid)
    zero = fmt.encode(torch.zeros(codes.shape, device=codes.device), bare)
    return torch.where(grid["mask"], codes, zero), bare


def pack_mask(kept: Tensor) -> Tensor:
    """(out, n) bool -> (out, ceil(n / 8)) uint8, the first position in the lowest bit."""
    bits = torch.nn.functional.pad(kept.to(torch.uint8), (0, -kept.shape[1] % 8))
    place = torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (bits.view(kept.shape[0], -1, 8) << place).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, n: int) -> Tensor:
    """The inverse of pack_mask."""
    place = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> place & 1).view(packed.shape[0], -1)[:, :n].bool()


def _bare(grid: Grid) -> Grid:
    return {k: g for k, g in grid.items() if k != "mask"}
