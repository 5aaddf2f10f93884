"""Q2_K, Q3_K, Q4_K, Q5_K, Q6_K: super-blocks of 256 with integer scales (and mins) inside.

    w = (d * scale) * level - (dmin * min)         Q2_K, Q4_K, Q5_K: levels from 0
    w = (d * scale) * level                        Q3_K, Q6_K: levels around 0

The grid: d (and dmin) (out, blocks), float32 that float16 holds; scale (and min) (out, blocks,
subs), whole numbers in float32. *Source:* llama.cpp, ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lighten.formats import gguf_k_pack as layout
from lighten.registry import formats
from lighten.scale_search import HALF_MAX, Consecutive, checked, half, over_chunks, reciprocal
from lighten.super_block import Search, fit_super_blocks, refit_sub_blocks
from lighten.types import Grid

BLOCK = 256
Packed = tuple[Tensor, Grid]


@dataclass(frozen=True)
class SuperBlock:
    """One type. nbytes: of a super-block. join and split: its bytes, see gguf_k_pack."""

    name: str
    sub: int
    nbytes: int
    search: Search
    largest: int
    join: Callable[[Tensor, Grid], Tensor]
    split: Callable[[Tensor], Packed]
    block: int = BLOCK
    step: int = 1

    def bits(self, columns: int) -> float:
        return 8 * self.nbytes / BLOCK

    def accepts(self, shape: tuple[int, int]) -> str | None:
        if shape[1] % BLOCK:
            return (
                f"{self.name} needs rows of a multiple of {BLOCK} columns;"
                f" these have {shape[1]} ({shape[1] % BLOCK} too many)"
            )
        return None

    # -- numbers -------------------------------------------------------------------------------
    def fit(self, w: Tensor, importance: Tensor | None = None) -> Grid:
        """d, scale (and dmin, min); raises BadInput. Steps too fine for float16 round to its."""
        reach = HALF_MAX * max(-self.search.scale_low, self.search.scale_high)
        checked(self.name, w, importance, reach * self.largest)

        def fit(x: Tensor, imp: Tensor) -> tuple[Tensor, ...]:
            return fit_super_blocks(x, imp, self.search)

        tries = max(len(self.search.tries), len(self.search.peaks))
        d, dmin, scale, minimum = over_chunks(fit, w, importance, self.sub, BLOCK, tries)
        shape = (w.shape[0], w.shape[1] // BLOCK)
        grid = {"d": d.view(shape), "scale": scale.view(*shape, -1)}
        if self.search.affine:
            grid |= {"dmin": dmin.view(shape), "min": minimum.view(*shape, -1)}
        return grid

    def refit(self, w: Tensor, grid: Grid, start: int, importance: Tensor | None = None) -> Grid:
        """The grid with the integers of the sub-block at column `start` chosen again for w."""
        block, i = start // BLOCK, start % BLOCK // self.sub
        d, scale = grid["d"][:, block], grid["scale"][:, block, i]
        affine = self.search.affine
        dmin = grid["dmin"][:, block] if affine else torch.zeros_like(d)
        minimum = grid["min"][:, block, i] if affine else torch.zeros_like(d)
        imp = torch.ones_like(w) if importance is None else importance.to(w).expand(w.shape)
        mean = imp.mean(1, keepdim=True)
        imp = torch.where(mean > 0, imp / torch.where(mean > 0, mean, 1.0), 1.0)
        scale, minimum = refit_sub_blocks(
            w.t().contiguous(), imp.t().contiguous(), self.search, d, dmin, scale, minimum
        )
        new = dict(grid, scale=grid["scale"].clone())
        new["scale"][:, block, i] = scale
        if affine:
            new["min"] = grid["min"].clone()
            new["min"][:, block, i] = minimum
        return new

    def settle(self, part: str, value: Tensor) -> Tensor:
        if part in ("d", "dmin"):
            return half(value)
        s = self.search
        low, high = (s.scale_low, s.scale_high) if part == "scale" else (0, s.min_high)
        return value.round().clamp_(low, high)

    def encode(self, w: Tensor, grid: Grid, start: int = 0) -> Tensor:
        scale, minimum = self._columns(grid, start, w.shape[1])
        u = (w if minimum is None else w + minimum) * reciprocal(scale)
        levels = self.search.levels
        if isinstance(levels, Consecutive):
            low, high = levels.low, levels.high
            return u.round_().clamp_(low, high).sub_(low).to(torch.uint8)
        return levels.code(u)  # type: ignore[attr-defined, no-any-return]

    def decode(self, codes: Tensor, grid: Grid, start: int = 0) -> Tensor:
        scale, minimum = self._columns(grid, start, codes.shape[1])
        levels = self.search.levels
        if isinstance(levels, Consecutive):
            level = codes.float().add_(levels.low)
        else:
            level = levels.level(codes)  # type: ignore[attr-defined]
        level.mul_(scale)
        return level if minimum is None else level.sub_(minimum)

    def _columns(self, grid: Grid, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Scale and min of each column start..start+count (or one column for all of them)."""
        k, last = self.sub, start + count - 1
        first = start // BLOCK
        blocks = slice(first, last // BLOCK + 1)
        inside = slice(start // k - first * (BLOCK // k), last // k - first * (BLOCK // k) + 1)

        def spread(d: Tensor, integer: Tensor) -> Tensor:
            product = (d[:, blocks, None] * integer[:, blocks]).flatten(1)[:, inside]
            if product.shape[1] == 1:
                return product
            offset = start % k
            return product.repeat_interleave(k, 1)[:, offset : offset + count]

        scale = spread(grid["d"], grid["scale"])
        return scale, spread(grid["dmin"], grid["min"]) if self.search.affine else None

    # -- bytes ---------------------------------------------------------------------------------
    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        """bytes (out, blocks * nbytes)."""
        flat = {
            k: g.reshape(codes.shape[0] * (codes.shape[1] // BLOCK), -1) for k, g in grid.items()
        }
        stored = self.join(codes.reshape(-1, BLOCK), flat)
        return {"bytes": stored.view(codes.shape[0], -1)}

    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, int]) -> Packed:
        codes, flat = self.split(packed["bytes"].reshape(-1, self.nbytes))
        blocks = (shape[0], shape[1] // BLOCK)
        grid = {k: g.view(*blocks, -1) if g.dim() == 2 else g.view(blocks) for k, g in flat.items()}
        return codes.reshape(shape), grid


def _q2_join(codes: Tensor, g: Grid) -> Tensor:
    scales = g["scale"].to(torch.uint8) | g["min"].to(torch.uint8) << 4
    return torch.cat([scales, layout.planes(codes, 2, 32), _heads(g)], 1)


def _q2_split(b: Tensor) -> Packed:
    d, dmin = layout.un_halves(b[:, 80:])
    scale, minimum = (b[:, :16] & 15).float(), (b[:, :16] >> 4).float()
    grid = {"d": d, "dmin": dmin, "scale": scale, "min": minimum}
    return layout.unplanes(b[:, 16:80], 2, 32), grid


def _q3_join(codes: Tensor, g: Grid) -> Tensor:
    high, low = layout.planes(codes >> 2, 1, 32), layout.planes(codes & 3, 2, 32)
    return torch.cat(
        [high, low, layout.six_bit_q3((g["scale"] + 32).to(torch.uint8)), _heads(g)], 1
    )


def _q3_split(b: Tensor) -> Packed:
    codes = layout.unplanes(b[:, 32:96], 2, 32) | layout.unplanes(b[:, :32], 1, 32) << 2
    scale = layout.un_six_bit_q3(b[:, 96:108]).float() - 32
    return codes, {"d": layout.un_halves(b[:, 108:])[0], "scale": scale}


def _q4_join(codes: Tensor, g: Grid) -> Tensor:
    pairs = layout.six_bit_pairs(g["scale"].to(torch.uint8), g["min"].to(torch.uint8))
    return torch.cat([_heads(g), pairs, layout.planes(codes, 4, 32)], 1)


def _q45_grid(b: Tensor) -> Grid:
    d, dmin = layout.un_halves(b[:, :4])
    scale, minimum = layout.un_six_bit_pairs(b[:, 4:16])
    return {"d": d, "dmin": dmin, "scale": scale.float(), "min": minimum.float()}


def _q4_split(b: Tensor) -> Packed:
    return layout.unplanes(b[:, 16:], 4, 32), _q45_grid(b)


def _q5_join(codes: Tensor, g: Grid) -> Tensor:
    pairs = layout.six_bit_pairs(g["scale"].to(torch.uint8), g["min"].to(torch.uint8))
    high, low = layout.planes(codes >> 4, 1, 32), layout.planes(codes & 15, 4, 32)
    return torch.cat([_heads(g), pairs, high, low], 1)


def _q5_split(b: Tensor) -> Packed:
    codes = layout.unplanes(b[:, 48:], 4, 32) | layout.unplanes(b[:, 16:48], 1, 32) << 4
    return codes, _q45_grid(b)


def _q6_join(codes: Tensor, g: Grid) -> Tensor:
    low, high = layout.planes(codes & 15, 4, 64), layout.planes(codes >> 4, 2, 32)
    scale = g["scale"].to(torch.int8).view(torch.uint8)
    return torch.cat([low, high, scale, _heads(g)], 1)


def _q6_split(b: Tensor) -> Packed:
    codes = layout.unplanes(b[:, :128], 4, 64) | layout.unplanes(b[:, 128:192], 2, 32) << 4
    scale = b[:, 192:208].contiguous().view(torch.int8).float()
    return codes, {"d": layout.un_halves(b[:, 208:])[0], "scale": scale}


def _heads(g: Grid) -> Tensor:
    return layout.halves(*(g[k].reshape(-1) for k in ("d", "dmin") if k in g))


def _span(low: float, high: float, count: int) -> list[float]:
    return torch.linspace(low, high, count).tolist()


def _clips(low: float, high: float, count: int) -> list[tuple[float, float]]:
    """Shares of the range, each cut at the top, at both ends and at the bottom."""
    return [(f, t) for f in _span(low, high, count) for t in (0.0, 0.5, 1.0)]


def _both(targets: list[float]) -> list[float]:
    return targets + [-t for t in targets]


# more starts help more than more rounds: each ends in another local optimum
_Q2 = Search(16, Consecutive(0, 3), 0, 15, 15, _clips(0.45, 1.1, 5), _span(8, 18, 16))
_Q3 = Search(16, Consecutive(-4, 3), -32, 31, 0, _both(_span(2.6, 6, 8)), _both(_span(26, 33, 8)))
_Q4 = Search(8, Consecutive(0, 15), 0, 63, 63, _clips(0.6, 1.05, 10), _span(52, 65, 27))
_Q5 = Search(8, Consecutive(0, 31), 0, 63, 63, _clips(0.78, 1.03, 8), _span(52, 65, 27))
_Q6_TRIES = [*_span(-34, -26, 11), *_span(27, 33, 5)]
_Q6 = Search(16, Consecutive(-32, 31), -128, 127, 0, _Q6_TRIES, _both(_span(115, 129, 8)))

for _format in (
    SuperBlock("q2_k", 16, 84, _Q2, 3, _q2_join, _q2_split),
    SuperBlock("q3_k", 16, 110, _Q3, 4, _q3_join, _q3_split),
    SuperBlock("q4_k", 32, 144, _Q4, 15, _q4_join, _q4_split),
    SuperBlock("q5_k", 32, 176, _Q5, 31, _q5_join, _q5_split),
    SuperBlock("q6_k", 16, 210, _Q6, 32, _q6_join, _q6_split),
):
    formats(_format.name)(_format)
