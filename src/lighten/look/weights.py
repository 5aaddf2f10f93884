"""Weights before and after: their histogram, how far apart they are, the grid of one block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lighten.sparse import pinned
from lighten.types import Compressed

BINS = 32

SAMPLED = 2**18
"""Weights of a layer that are looked at; of larger ones an even sample of rows."""

MOST_LEVELS = 64
_TAIL = 1e-3


def sampled(rows: int, columns: int) -> Tensor | None:
    """Indices of the rows that are looked at; None: all."""
    count = max(1, SAMPLED // columns)
    return None if rows <= count else torch.linspace(0, rows - 1, count).long()


def histogram(before: Tensor, after: Tensor | None) -> dict[str, Any]:
    """{"edges": 33 numbers, "before", "after": 32 counts}; same edges for both.

    The outermost thousandth of the weights on either side is counted in the first and last bin.
    """
    flat = before.flatten().float()
    few = flat[:: max(1, flat.numel() // 2**14)].sort().values
    low, high = (float(few[int(share * (len(few) - 1))]) for share in (_TAIL, 1 - _TAIL))
    if not low < high:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    found: dict[str, Any] = {"edges": [_short(float(e)) for e in edges]}
    found["before"] = _counts(flat, low, high)
    if after is not None:
        found["after"] = _counts(after.flatten().float(), low, high)
    return found


def _counts(w: Tensor, low: float, high: float) -> list[int]:
    counts = torch.histc(w.clamp(low, high), BINS, low, high)
    return [int(c) for c in counts]


def relative_error(before: Tensor, after: Tensor) -> float:
    """|before - after| / |before|, Frobenius norms; 0 where there was nothing."""
    norm = float(before.norm())
    return float((before - after).norm()) / norm if norm else 0.0


def levels(weight: Compressed) -> list[float] | None:
    """The numbers that one block may take: of the first block of the middle row.

    None where they are more than 64, or where codes are not numbers of their own (codebooks).
    """
    format: Any = weight.format
    if format.step != 1 or weight.shape[1] == 0:
        return None
    row = weight.rows(torch.tensor([weight.shape[0] // 2]))
    codes, grid = format.unpack(row.parts, row.shape)
    if "mask" in grid:  # a weight that was pruned shows nothing of its scale
        codes, grid = pinned(format.base, codes, grid)
        format = format.base
    if codes.is_floating_point() or codes.shape != row.shape:
        return None
    low, high = int(codes.min()), int(codes.max())
    if high - low >= MOST_LEVELS:
        return None
    values = {
        float(format.decode(torch.full_like(codes, code), grid)[0, 0])
        for code in range(low, high + 1)
    }
    return [_short(v) for v in sorted(values)]


def _short(value: float) -> float:
    """Four digits: a page holds hundreds of histograms."""
    return float(f"{value:.4g}")
