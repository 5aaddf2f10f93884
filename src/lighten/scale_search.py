"""Scale and min of many small groups of weights at once, by weighted least squares.

Weights lie as x (k, groups): one group per column, so that every sum runs along the first
dimension and every step is one pass over contiguous memory. A group is x ≈ scale * level - min.
Sums are taken over the residual in units of the scale, r = level - (x + min) / scale, which keeps
float32 exact enough for 8-bit levels, where the difference of two large sums would not be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from lighten.errors import BadInput

CHUNK = 1 << 18
"""Weights in flight: large enough for an operation to be worth several threads, small enough for
six float32 arrays to stay in the last cache. Measured on two cores, 2^18 is best for every type."""

CHUNK_DEVICE = 1 << 24
"""The same on an accelerator."""

HALF_MAX = 65504.0
"""The largest float16."""


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
        torch.clamp(u, self.low, self.high, out=out).round_()


def farthest(x: Tensor, dim: int) -> Tensor:
    """The entry of the largest magnitude along dim, with its sign."""
    low, high = x.amin(dim), x.amax(dim)
    return torch.where(high >= -low, high, low)


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
    return scale.reciprocal().nan_to_num_(0.0, 0.0, 0.0)


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


def half(t: Tensor) -> Tensor:
    """t as float16 stores it (nearest even, saturated), in float32."""
    return t.clamp(-HALF_MAX, HALF_MAX).half().float()


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b for b >= 0, and 0 where b is 0."""
    return (a / b).masked_fill_(b == 0, 0.0)


def refit_scale(scale: Tensor, mo: Moments) -> tuple[Tensor, Tensor]:
    """The scale that is best for these levels, and its squared error."""
    step = divide(mo.cross, mo.square)
    return scale * (1 - step), scale * scale * (mo.error - step * mo.cross).clamp_(min=0)


def refit_affine(
    scale: Tensor, minimum: Tensor, w_sum: Tensor, mo: Moments, signed: bool = False
) -> tuple[Tensor, ...]:
    """Scale and min (>= 0 unless signed) best for these levels, and their squared error."""
    product = mo.square * w_sum
    spread = product - mo.total * mo.total
    flat = spread <= 1e-6 * product  # all levels alike: only the min can be told
    shift = (mo.cross * mo.total - mo.first * mo.square) / spread
    shift = torch.where(flat, -mo.first / w_sum, shift)
    if not signed:
        shift = torch.minimum(shift, minimum * reciprocal(scale))  # min stays >= 0
    slope = torch.addcmul(mo.cross, shift, mo.total)
    step = (slope / mo.square).masked_fill_(flat, 0.0)
    error = mo.error + shift * (2 * mo.first + shift * w_sum)
    error += step * (step * mo.square - 2 * slope)
    minimum = minimum - scale * shift
    return scale * (1 - step), minimum if signed else minimum.clamp_(min=0), scale * scale * error


def moments_of_each(
    x: Tensor, w: Tensor, inverse: Tensor, offset: Tensor | None, levels: Levels, work: Work
) -> Moments:
    """moments for every row of inverse (and offset) (tries, groups), stacked alike.

    What follows is arithmetic on few numbers, whose cost is the number of operations: once for all.
    """
    each = [
        moments(x, w, row, None if offset is None else offset[i], levels, work)
        for i, row in enumerate(inverse)
    ]
    names = [f.name for f in fields(Moments)]
    return Moments(**{name: torch.stack([getattr(m, name) for m in each]) for name in names})


def search_scale(
    x: Tensor, w: Tensor, levels: Levels, tries: Sequence[float], rounds: int, work: Work
) -> Tensor:
    """The best scale (groups,) found; tries: levels on which the largest magnitude may fall."""
    scales = farthest(x, 0) / torch.tensor(tries, device=x.device)[:, None]
    mo = moments_of_each(x, w, reciprocal(scales), None, levels, work)
    scales, errors = refit_scale(scales, mo)
    error, at = errors.min(0)
    best = scales.gather(0, at[None])[0]
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
    signed: bool = False,
) -> tuple[Tensor, Tensor]:
    """The best scale and min (groups,) found, for levels 0..high; min >= 0 unless signed.

    tries: (share of the range max - min that the levels span, share of the rest cut off below).
    """
    low = x.amin(0) if signed else x.amin(0).clamp_(max=0)
    width = x.amax(0) - low
    w_sum = w.sum(0)
    share = torch.tensor([f for f, _ in tries], device=x.device)[:, None]
    below = torch.tensor([(1 - f) * t for f, t in tries], device=x.device)[:, None]
    scales, mins = width * (share / levels.high), -low - width * below
    if not signed:
        mins.clamp_(min=0)
    inverse = reciprocal(scales)
    mo = moments_of_each(x, w, inverse, mins * inverse, levels, work)
    scales, mins, errors = refit_affine(scales, mins, w_sum, mo, signed)
    error, at = errors.min(0)
    best = scales.gather(0, at[None])[0], mins.gather(0, at[None])[0]
    for _ in range(rounds):
        scale, minimum = best
        inverse = reciprocal(scale)
        mo = moments(x, w, inverse, minimum * inverse, levels, work)
        scale, minimum, e = refit_affine(scale, minimum, w_sum, mo, signed)
        better = e < error
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
    tries: int = 1,
) -> list[Tensor]:
    """fn over chunks of x (k, groups) and importance alike; its results (groups or units,) joined.

    unit: columns that share one normalisation, a multiple of k; a chunk is whole units. Importance
    has mean 1 over a unit. A unit without any counts evenly; elsewhere the least is a millionth of
    the mean, lest a group be left undetermined. tries: numbers per group that fn handles at once.
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

    room = CHUNK if w.device.type == "cpu" else CHUNK_DEVICE
    step = max(1, room // (unit // k * max(k, tries)))
    starts = range(0, x.shape[0], step)
    parts = [one(start) for start in starts]
    return [torch.cat(column) for column in zip(*parts, strict=True)]
