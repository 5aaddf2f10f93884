"""Super-blocks: sub-blocks whose scales (and mins) are small integers times a shared float16.

    w = (d * scale) * level - dmin * min

The search: (1) the best real scale and min of every sub-block; (2) the d, and dmin, under which
rounding them to integers costs least, by the curvature of the squared error; (3) in turns, the
integers next to the present ones by measured error, and d and dmin by least squares. Weights lie
as in lighten.scale_search: x (k, groups), the sub-blocks of a super-block side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lighten.scale_search import (
    Consecutive,
    Levels,
    Moments,
    Work,
    divide,
    farthest,
    half,
    moments,
    reciprocal,
    search_affine,
    search_scale,
    squared_error,
)

_CROSS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
_SQUARE = (*_CROSS, (-1, -1), (-1, 1), (1, -1), (1, 1))
_LINE = ((0, 0), (-1, 0), (1, 0))


@dataclass(frozen=True)
class Search:
    """What a super-block can hold, and how hard to look.

    subs: sub-blocks. scale_low..scale_high, 0..min_high: the integers (min_high 0: no mins).
    tries: as search_scale or, with mins, search_affine takes them. peaks: integers, not
    necessarily whole, on which the largest scale (and min) may fall.
    """

    subs: int
    levels: Levels
    scale_low: int
    scale_high: int
    min_high: int
    tries: Sequence[float] | Sequence[tuple[float, float]]
    peaks: Sequence[float]
    rounds: int = 1

    @property
    def affine(self) -> bool:
        return self.min_high > 0


@dataclass(frozen=True)
class Fitted:
    """d, dmin (super-blocks,) real numbers that float16 holds; scale, min (groups,) integers."""

    d: Tensor
    dmin: Tensor
    scale: Tensor
    min: Tensor


@dataclass(frozen=True)
class Problem:
    """One chunk: weights brought near 1 by a power of two per super-block, and its sums."""

    x: Tensor
    w: Tensor
    unit: Tensor  # (super-blocks,) the powers of two
    spec: Search
    work: Work
    w_sum: Tensor
    wx: Tensor
    wxx: Tensor

    @classmethod
    def of(cls, x: Tensor, w: Tensor, spec: Search, unit: Tensor | None = None) -> Problem:
        if unit is None:
            unit = _unit(x, spec.subs)
        x = x / unit.repeat_interleave(spec.subs)
        work = Work.like(x)
        torch.mul(x, w, out=work.t)
        wx = work.t.sum(0)
        return cls(x, w, unit, spec, work, w.sum(0), wx, work.t.mul_(x).sum(0))

    def half(self, d: Tensor) -> Tensor:
        """d as float16 stores it (saturated), in this problem's units; d (..., super-blocks)."""
        return half(d * self.unit) / self.unit

    def spread(self, per_super_block: Tensor) -> Tensor:
        return per_super_block.repeat_interleave(self.spec.subs)

    def errors(self, scales: Tensor, mins: Tensor) -> Tensor:
        """Σ w (decoded - x)² for real scales and mins, all (tries, groups)."""
        inverse = reciprocal(scales)
        offset = mins * inverse if self.spec.affine else [None] * len(scales)
        levels, work = self.spec.levels, self.work
        e = torch.stack(
            [
                squared_error(self.x, self.w, i, o, levels, work)
                for i, o in zip(inverse, offset, strict=True)
            ]
        )
        flat = self.wxx + mins * (2 * self.wx + mins * self.w_sum)
        return torch.where(inverse == 0, flat, e.mul_(scales).mul_(scales))

    def moments(self, scale: Tensor, minimum: Tensor) -> Moments:
        inverse = reciprocal(scale)
        offset = minimum * inverse if self.spec.affine else None
        return moments(self.x, self.w, inverse, offset, self.spec.levels, self.work)


def fit_super_blocks(x: Tensor, w: Tensor, spec: Search) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d, dmin (super-blocks,), scale, min (groups,) for x (k, groups), importance w alike."""
    p = Problem.of(x, w, spec)
    scale, minimum = best_real(p)
    now = _quantized(p, scale, minimum)
    now, error = _neighbours(p, now, _SQUARE if spec.affine else _LINE)
    for _ in range(spec.rounds):
        new, e = _neighbours(p, _shared_refit(p, now), _CROSS if spec.affine else _LINE)
        better = e < error
        fine = p.spread(better)
        now = Fitted(
            torch.where(better, new.d, now.d),
            torch.where(better, new.dmin, now.dmin),
            torch.where(fine, new.scale, now.scale),
            torch.where(fine, new.min, now.min),
        )
        error = torch.where(better, e, error)
    return now.d * p.unit, now.dmin * p.unit, now.scale, now.min


def refit_sub_blocks(
    x: Tensor, w: Tensor, spec: Search, d: Tensor, dmin: Tensor, scale: Tensor, minimum: Tensor
) -> tuple[Tensor, Tensor]:
    """Integers (groups,) for sub-blocks x (k, groups), each with the d and dmin (groups,) given.

    Never worse than the present `scale` and `minimum`.
    """
    unit = torch.maximum(_unit(x, 1), _unit(d[None].abs() * 2.0**-20, 1))
    p = Problem.of(x, w, _single(spec), unit)
    d, dmin = d / unit, dmin / unit
    real, low = best_real(p)
    s = (real * reciprocal(d)).clamp_(spec.scale_low, spec.scale_high).round_()
    if spec.affine:
        mo = p.moments(real, low)
        low = _min_for(p, mo, real, low, s * d)
        m = (low * reciprocal(dmin)).clamp_(0, spec.min_high).round_()
    else:
        m = torch.zeros_like(s)
    start, e = _neighbours(p, Fitted(d, dmin, s, m), _SQUARE if spec.affine else _LINE)
    now, error = _neighbours(p, Fitted(d, dmin, scale, minimum), _CROSS if spec.affine else _LINE)
    better = e < error
    return torch.where(better, start.scale, now.scale), torch.where(better, start.min, now.min)


def best_real(p: Problem) -> tuple[Tensor, Tensor]:
    """The best scale and min of every sub-block, were they free."""
    if not p.spec.affine:
        tries: Sequence[float] = p.spec.tries  # type: ignore[assignment]
        scale = search_scale(p.x, p.w, p.spec.levels, tries, 1, p.work)
        return scale, torch.zeros_like(scale)
    if not isinstance(p.spec.levels, Consecutive):
        raise TypeError("a min goes with consecutive levels")
    pairs: Sequence[tuple[float, float]] = p.spec.tries  # type: ignore[assignment]
    return search_affine(p.x, p.w, p.spec.levels, pairs, 2, p.work)


def _unit(x: Tensor, subs: int) -> Tensor:
    """A power of two per super-block near its largest magnitude."""
    peak = x.abs().amax(0).view(-1, subs).amax(1)
    exponent = torch.where(peak > 0, torch.frexp(peak).exponent, 0).clamp_(-60, 60)
    return torch.ldexp(torch.ones_like(peak), exponent)


def _single(spec: Search) -> Search:
    return Search(
        1, spec.levels, spec.scale_low, spec.scale_high, spec.min_high, spec.tries, spec.peaks
    )


def _min_for(p: Problem, mo: Moments, real: Tensor, low: Tensor, scale: Tensor) -> Tensor:
    """The min that suits a scale other than the best one, to second order."""
    return (low + mo.total / p.w_sum * (scale - real)).clamp_(min=0)


def _shared(
    p: Problem, real: Tensor, curvature: Tensor, peaks: Sequence[float], low: int, high: int
) -> tuple[Tensor, Tensor]:
    """The float16 (super-blocks,) and integers (groups,) that lie nearest to real (groups,)."""
    r, c = real.view(-1, p.spec.subs), curvature.view(-1, p.spec.subs)
    targets = torch.tensor(peaks, device=r.device)
    d = p.half(farthest(r, 1) / targets[:, None])
    integer = (r * reciprocal(d)[..., None]).clamp_(low, high).round_()
    cost = (integer * d[..., None]).sub_(r).square_().mul_(c).sum(-1)
    d = d.gather(0, cost.argmin(0, keepdim=True))[0]
    return d, (r * reciprocal(d)[:, None]).clamp_(low, high).round_().view(-1)


def _quantized(p: Problem, real: Tensor, low: Tensor) -> Fitted:
    """The d, dmin and integers nearest to the real scales and mins."""
    spec, mo = p.spec, p.moments(real, low)
    curvature = mo.square
    if spec.affine:  # the min gives way when the scale moves
        curvature = (mo.square - mo.total * mo.total / p.w_sum).clamp_(min=0) + 1e-6 * mo.square
    d, s = _shared(p, real, curvature, spec.peaks, spec.scale_low, spec.scale_high)
    if not spec.affine:
        return Fitted(d, torch.zeros_like(d), s, torch.zeros_like(s))
    low = _min_for(p, mo, real, low, s * p.spread(d))
    dmin, m = _shared(p, low, p.w_sum, spec.peaks, 0, spec.min_high)
    return Fitted(d, dmin, s, m)


def _neighbours(
    p: Problem, at: Fitted, offsets: Sequence[tuple[int, int]]
) -> tuple[Fitted, Tensor]:
    """For every sub-block the best of the integers nearby; its error (super-blocks,)."""
    by = torch.tensor(offsets, dtype=torch.float32, device=at.d.device)
    s = (at.scale + by[:, :1]).clamp_(p.spec.scale_low, p.spec.scale_high)
    m = (at.min + by[:, 1:]).clamp_(0, p.spec.min_high)
    error, best = p.errors(p.spread(at.d) * s, p.spread(at.dmin) * m).min(0)
    found = Fitted(at.d, at.dmin, s.gather(0, best[None])[0], m.gather(0, best[None])[0])
    return found, error.view(-1, p.spec.subs).sum(1)


def _shared_refit(p: Problem, at: Fitted) -> Fitted:
    """d and dmin by least squares for the present codes and integers."""
    s, m = p.spread(at.d) * at.scale, p.spread(at.dmin) * at.min
    mo = p.moments(s, m)

    def total(t: Tensor) -> Tensor:
        return t.view(-1, p.spec.subs).sum(1)

    aa, ax = total(s * s * mo.square), total(s * s * mo.cross)
    if not p.spec.affine:
        return Fitted(p.half(at.d * (1 - divide(ax, aa))), at.dmin, at.scale, at.min)
    # where the scale is 0 the residual is -min - x whatever the codes
    first = torch.where(reciprocal(s) == 0, -m * p.w_sum - p.wx, s * mo.first)
    ab, bb, bx = -total(s * m * mo.total), total(m * m * p.w_sum), -total(m * first)
    det = aa * bb - ab * ab
    sound = det > 1e-6 * aa * bb
    safe = torch.where(sound, det, torch.ones_like(det))
    u = torch.where(sound, (ax * bb - bx * ab) / safe, divide(ax, aa))
    v = torch.where(sound, (bx * aa - ax * ab) / safe, torch.zeros_like(det))
    return Fitted(p.half(at.d * (1 - u)), p.half(at.dmin * (1 - v)), at.scale, at.min)
