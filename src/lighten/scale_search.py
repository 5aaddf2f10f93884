"""Scale and min of many small groups of weights at once, by weighted least squares.

Weights lie as x (k, groups): one group per column, so that every sum runs along the first
dimension and every step is one pass over contiguous memory. A group is x ≈ scale * level - min.
Sums are taken over the residual in units of the scale, r = level - (x + min) / scale, which keeps
float32 exact enough for 8-bit levels, where the difference of two large sums would not be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lighten.errors import BadInput

CHUNK = (1 << 15) - 1
"""Weights in flight per thread: six float32 arrays of this size stay in a core's L2 cache, and
torch runs operations on so few on the thread that calls them: no barrier per operation, which on a
busy machine costs a hundred times the operation. Threads take whole chunks instead."""

CHUNK_DEVICE = 1 << 24
"""The same on an accelerator."""


class Levels(Protocol):
    """The numbers that a code stands for, before the scale."""

    def snap(self, u: Tensor, out: Tensor) -> None:
        """Write the nearest level to each u into out."""


@dataclass(frozen=True)
class Consecutive:
    """The integers low..high."""

    low: int
    high: int

    def snap(self, u: Tensor, out: Tensor) -> None:
        torch.round(u, out=out)
        out.clamp_(self.low, self.high)


@dataclass
class Work:
    """Three arrays like x, reused by every pass."""

    u: Tensor
    level: Tensor
    t: Tensor

    @classmethod
    def like(cls, x: Tensor) -> Work:
        return cls(torch.empty_like(x), torch.empty_like(x), torch.empty_like(x))


@dataclass(frozen=True)
class Moments:
    """Weighted sums (groups,) over r and the levels, see the module's first lines."""

    error: Tensor  # Σ w r²
    cross: Tensor  # Σ w r level
    square: Tensor  # Σ w level²
    first: Tensor  # Σ w r
    total: Tensor  # Σ w level


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0 (or so small that its reciprocal overflows)."""
    inverse = scale.reciprocal()
    return torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(inverse))


def nearest_levels(
    x: Tensor, inverse: Tensor, offset: Tensor | None, levels: Levels, work: Work
) -> None:
    """work.level = nearest levels, work.u = r = level - (x * inverse + offset)."""
    if offset is None:
        torch.mul(x, inverse, out=work.u)
    else:
        torch.addcmul(offset, x, inverse, out=work.u)
    levels.snap(work.u, work.level)
    torch.sub(work.level, work.u, out=work.u)


def squared_error(
    x: Tensor, w: Tensor, inverse: Tensor, offset: Tensor | None, levels: Levels, work: Work
) -> Tensor:
    """Σ w r² (groups,), in squared units of the scale."""
    nearest_levels(x, inverse, offset, levels, work)
    work.u.square_().mul_(w)
    return work.u.sum(0)


def moments(
    x: Tensor, w: Tensor, inverse: Tensor, offset: Tensor | None, levels: Levels, work: Work
) -> Moments:
    """The sums that a refit needs; first and total only where there is an offset."""
    nearest_levels(x, inverse, offset, levels, work)
    u, level, t = work.u, work.level, work.t
    torch.mul(w, u, out=t)
    zero = first = total = torch.zeros_like(inverse)
    if offset is not None:
        first = t.sum(0)
    error = u.mul_(t).sum(0)
    cross = t.mul_(level).sum(0)
    torch.mul(w, level, out=t)
    if offset is not None:
        total = t.sum(0)
    return Moments(error, cross, t.mul_(level).sum(0), first, total if offset is not None else zero)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b > 0, a / torch.where(b > 0, b, torch.ones_like(b)), torch.zeros_like(a))


def refit_scale(scale: Tensor, mo: Moments) -> tuple[Tensor, Tensor]:
    """The scale that is best for these levels, and its squared error."""
    step = _divide(mo.cross, mo.square)
    return scale * (1 - step), scale * scale * (mo.error - step * mo.cross).clamp_(min=0)


def refit_affine(scale: Tensor, minimum: Tensor, w_sum: Tensor, mo: Moments) -> tuple[Tensor, ...]:
    """Scale and min >= 0 that are best for these levels, and their squared error."""
    spread = mo.square * w_sum - mo.total * mo.total
    flat = spread <= 1e-6 * mo.square * w_sum
    shift = (mo.cross * mo.total - mo.first * mo.square) / torch.where(
        flat, torch.ones_like(spread), spread
    )
    shift = torch.where(flat, -_divide(mo.first, w_sum), shift)
    shift = torch.minimum(shift, minimum * reciprocal(scale))  # min stays >= 0
    slope = mo.cross + shift * mo.total
    step = torch.where(flat, torch.zeros_like(slope), _divide(slope, mo.square))
    error = mo.error + 2 * shift * mo.first + shift * shift * w_sum
    error += step * (step * mo.square - 2 * slope)
    return scale * (1 - step), (minimum - scale * shift).clamp_(min=0), scale * scale * error


def search_scale(
    x: Tensor, w: Tensor, levels: Levels, tries: Sequence[float], rounds: int, work: Work
) -> Tensor:
    """The best scale (groups,) found; tries: levels on which the largest magnitude may fall."""
    at = x.abs().argmax(0, keepdim=True)
    peak = x.gather(0, at)[0]
    best = torch.zeros_like(peak)
    error = torch.full_like(peak, torch.inf)
    for target in tries:
        scale = peak / target
        scale, e = refit_scale(scale, moments(x, w, reciprocal(scale), None, levels, work))
        better = e < error
        best, error = torch.where(better, scale, best), torch.where(better, e, error)
    for _ in range(rounds):
        scale, e = refit_scale(best, moments(x, w, reciprocal(best), None, levels, work))
        better = e < error
        best, error = torch.where(better, scale, best), torch.where(better, e, error)
    return best


def search_affine(
    x: Tensor,
    w: Tensor,
    levels: Consecutive,
    tries: Sequence[tuple[float, float]],
    rounds: int,
    work: Work,
) -> tuple[Tensor, Tensor]:
    """The best scale and min >= 0 (groups,) found, for levels 0..high.

    tries: (share of the range max - min that the levels span, share of the rest cut off below).
    """
    low = x.amin(0).clamp_(max=0)
    width = x.amax(0) - low
    w_sum = w.sum(0)
    best = torch.zeros_like(low), torch.zeros_like(low)
    error = torch.full_like(low, torch.inf)
    starts = (
        (width * (f / levels.high), (-low - width * ((1 - f) * t)).clamp_(min=0)) for f, t in tries
    )
    for i, start in enumerate([*starts] + [None] * rounds):
        scale, minimum = best if start is None else start
        inverse = reciprocal(scale)
        mo = moments(x, w, inverse, minimum * inverse, levels, work)
        scale, minimum, e = refit_affine(scale, minimum, w_sum, mo)
        better = e < error if i else torch.ones_like(e, dtype=torch.bool)
        best = torch.where(better, scale, best[0]), torch.where(better, minimum, best[1])
        error = torch.where(better, e, error)
    return best


def checked(name: str, w: Tensor, importance: Tensor | None, largest: float) -> None:
    """Raise BadInput where the weights or their importance cannot be fitted."""
    peak = float(w.abs().amax()) if w.numel() else 0.0
    if not peak < float("inf"):
        raise BadInput(
            f"{name}: the weight has NaN or infinite entries", "mend the model, or keep the layer"
        )
    if peak > largest:
        raise BadInput(
            f"{name}: a weight of magnitude {peak:g} is larger than {largest:g}, the largest"
            " that its float16 scale reaches",
            "choose bf16 or f32 for this layer",
        )
    if importance is not None:
        least, most = (float(v) for v in importance.aminmax())
        if not (least >= 0 and most < float("inf")):
            raise BadInput(
                f"{name}: importance must be finite and >= 0, its range is {least:g}..{most:g}",
                "recompute the statistics",
            )


def over_chunks(
    fn: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    w: Tensor,
    importance: Tensor | None,
    k: int,
    unit: int,
) -> list[Tensor]:
    """fn over chunks of x (k, groups) and importance alike; its results (groups or units,) joined.

    unit: columns that share one normalisation, a multiple of k; a chunk is whole units. Importance
    has mean 1 over a unit. A unit without any counts evenly; elsewhere the least is a millionth of
    the mean, lest a group be left undetermined.
    """
    x = w.reshape(-1, unit)
    table = None if importance is None else importance.reshape(-1, unit)

    def one(start: int) -> tuple[Tensor, ...]:
        part = x[start : start + step].float()
        columns = part.reshape(-1, k).t().contiguous()
        if table is None:
            return fn(columns, torch.ones_like(columns))
        index = torch.arange(start, start + part.shape[0], device=w.device) % table.shape[0]
        imp = table[index].float()
        mean = imp.mean(1, keepdim=True)
        imp = torch.where(mean > 0, imp / torch.where(mean > 0, mean, 1.0), 1.0).clamp_(min=1e-6)
        return fn(columns, imp.reshape(-1, k).t().contiguous())

    step = max(1, (CHUNK if w.device.type == "cpu" else CHUNK_DEVICE) // unit)
    starts = range(0, x.shape[0], step)
    if w.device.type == "cpu" and len(starts) > 1:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            parts = list(pool.map(one, starts))
    else:
        parts = [one(start) for start in starts]
    return [torch.cat(column) for column in zip(*parts, strict=True)]
