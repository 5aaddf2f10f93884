"""How to choose the scale (and the min) of a block of weights: searches weighted by importance.

All functions work on rows x (rows, block) at once and try many scales in one tensor operation.
The error of a scale is measured after its least-squares refit, so the search needs few tries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Nearest = Callable[[Tensor], Tensor]
"""Numbers in units of the scale -> the nearest level, same shape."""

_CHUNK = 1 << 20  # floats in flight per operation: large enough to hide overhead, small for cache


def half(t: Tensor) -> Tensor:
    """t as float16 stores it (nearest even, saturated), in float32."""
    return t.clamp(-65504.0, 65504.0).half().float()


def in_chunks(fn: Callable[..., tuple[Tensor, ...]], tries: int, *rows: Tensor) -> list[Tensor]:
    """fn over chunks of rows, such that tries * chunk * block stays near the cache's size."""
    step = max(64, _CHUNK // (tries * rows[0].shape[1]))
    parts = [fn(*(r[i : i + step] for r in rows)) for i in range(0, rows[0].shape[0], step)]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def fit_scale(x: Tensor, importance: Tensor, nearest: Nearest, tries: Tensor) -> Tensor:
    """The float16 scale (rows,) with the least sum of importance * (x - scale * level)².

    x, importance: (rows, block). tries: (t,) levels that the largest magnitude may fall on; a
    negative one turns the grid round, which matters where levels are not symmetric.
    """

    def search(x: Tensor, importance: Tensor) -> tuple[Tensor]:
        peak = x.abs().amax(1)
        inverse = tries.to(x)[:, None] / peak.clamp(min=1e-30)  # (t, rows)
        weighted = x * importance
        level = nearest(x * inverse[..., None])
        dot = (level * weighted).sum(-1)
        norm = (level.square_() * importance).sum(-1)
        best = (dot * dot / norm.clamp(min=1e-30)).argmax(0, keepdim=True)
        scale = (dot / norm.clamp(min=1e-30)).gather(0, best)[0]
        for _ in range(2):  # codes for the refitted scale, then its least squares again
            level = nearest(x / _safe(scale)[:, None])
            norm = (level * level * importance).sum(-1)
            refit = (level * weighted).sum(-1) / norm.clamp(min=1e-30)
            scale = torch.where(norm > 0, refit, scale)
        return (half(torch.where(peak > 0, scale, torch.zeros_like(scale))),)

    return in_chunks(search, len(tries), x, importance)[0]


def fit_scale_min(
    x: Tensor, importance: Tensor, top: int, tries: Tensor, positive_min: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and min (rows,), real numbers, for x ≈ scale * code + min with codes 0..top.

    tries: (t,) how many steps the range max - min is cut into. positive_min: min must be <= 0
    (formats that store -min unsigned).
    """

    def search(x: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        low, high = x.amin(1), x.amax(1)
        if positive_min:
            low = low.clamp(max=0)
        width = (high - low).clamp(min=1e-30)
        inverse = tries.to(x)[:, None] / width
        total, first = importance.sum(1), (importance * x).sum(1)
        code = (((x - low[:, None]) * inverse[..., None]).round_()).clamp_(0, top)
        scale, minimum, gain = _line(code, x, importance, total, first, positive_min)
        best = gain.argmax(0, keepdim=True)
        scale, minimum = scale.gather(0, best)[0], minimum.gather(0, best)[0]
        for _ in range(2):
            code = ((x - minimum[:, None]) / _safe(scale)[:, None]).round_().clamp_(0, top)
            s, m, again = _line(code, x, importance, total, first, positive_min)
            better = again >= _gain(s * 0 + scale, minimum, code, x, importance)
            scale, minimum = torch.where(better, s, scale), torch.where(better, m, minimum)
        flat = high <= low
        scale = torch.where(flat, torch.zeros_like(scale), scale)
        minimum = torch.where(flat, low, minimum)
        return scale, minimum

    scale, minimum = in_chunks(search, len(tries), x, importance)
    return scale, minimum


def _line(
    code: Tensor, x: Tensor, weight: Tensor, total: Tensor, first: Tensor, positive_min: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted least squares of x on code: scale, min and by how much it lowers the error."""
    weighted = code * weight
    s1 = weighted.sum(-1)
    s2 = (weighted * code).sum(-1)
    cross = (weighted * x).sum(-1)
    det = total * s2 - s1 * s1
    safe = torch.where(det > 1e-12 * total * s2, det, torch.full_like(det, torch.inf))
    scale = (total * cross - s1 * first) / safe
    minimum = (first - scale * s1) / total.clamp(min=1e-30)
    if positive_min:
        over = minimum > 0
        scale = torch.where(over, cross / s2.clamp(min=1e-30), scale)
        minimum = minimum.clamp(max=0)
    gain = 2 * (scale * cross + minimum * first) - (
        scale * scale * s2 + 2 * scale * minimum * s1 + minimum * minimum * total
    )
    return scale, minimum, gain


def _gain(scale: Tensor, minimum: Tensor, code: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    y = scale[:, None] * code + minimum[:, None]
    return (weight * (2 * x * y - y * y)).sum(-1)


def _safe(scale: Tensor) -> Tensor:
    """scale without zeros, for dividing."""
    return torch.where(scale == 0, torch.full_like(scale, 1e-30), scale)
