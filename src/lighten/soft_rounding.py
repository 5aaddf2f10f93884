"""Which of two neighbouring codes each weight takes, decided by gradient for all weights at once.

A weight lies at q + h (q' - q): q is the code that it has, q' its neighbour on the side where the
error would like it to go, and h = clip(1.2 sigmoid(v) - 0.1, 0, 1) reaches 0 and 1. A term that is
gently annealed drives every h to one of its ends.

*Source:* Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization",
equations 21 to 24. Different here: neighbours are codes of any format, not floor and ceiling; it
begins at a solution of the sweep instead of at the weight itself; and the error of a row counts in
units of what it was at the beginning, so that rows do not know of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lighten.types import Format, Grid

STRETCH = (-0.1, 1.1)
"""The sigmoid is stretched so far and cut off: h reaches its ends at finite v."""

RATE, WEIGHT, WARM, BETA = 0.1, 10.0, 0.2, (20.0, 2.0)
"""Adam's rate, weight of the annealed term, share of steps before it begins, its exponents.

Measured on ten layers of EfficientNet-Lite0 in 4 bits, 100 steps: error 5.3 per cent below the
sweep with descent. Before, with a rate of 0.05 it was 4.4, with a weight of 1 as well 3.5."""


def openness(v: Tensor) -> Tensor:
    """h(v) in [0, 1]."""
    low, high = STRETCH
    return (torch.sigmoid(v) * (high - low) + low).clamp(0, 1)


def opened(h: Tensor) -> Tensor:
    """v with openness(v) = h; h is kept a hundredth away from the ends, where no gradient comes."""
    low, high = STRETCH
    return torch.logit((h.clamp(0.01, 0.99) - low) / (high - low))


def exponent(step: int, steps: int) -> float | None:
    """Of the annealed term 1 - |2h - 1|^exponent; None while it does not count yet."""
    first = WARM * steps
    if step < first:
        return None
    share = (step - first) / max(steps - first, 1)
    return BETA[1] + 0.5 * (BETA[0] - BETA[1]) * (1 + math.cos(share * math.pi))


def neighbours(fmt: Format, codes: Tensor, grid: Grid, target: Tensor) -> tuple[Tensor, Tensor]:
    """The code beside each of `codes` that lies towards `target` (out, in), and its number; the
    code itself where it is the last. For formats whose codes are in order of what they mean."""
    q = fmt.decode(codes, grid)
    far = torch.full_like(target, 1e30)
    ends = fmt.encode(far, grid), fmt.encode(-far, grid)
    first, last = torch.minimum(*ends), torch.maximum(*ends)
    up = torch.where(codes < last, codes + 1, codes)
    down = torch.where(codes > first, codes - 1, codes)
    value_up, value_down = fmt.decode(up, grid), fmt.decode(down, grid)
    other, value = codes, q
    for beside, number in ((up, value_up), (down, value_down)):
        towards = (number - q) * (target - q) > 0
        other, value = torch.where(towards, beside, other), torch.where(towards, number, value)
    return other, value


def learn_codes(
    w: Tensor, product: Callable[[Tensor], Tensor], diagonal: Tensor, fmt: Format, codes: Tensor,
    grid: Grid, steps: int,
) -> Tensor:  # fmt: skip
    """Codes (out, in) near `codes`, with low Δ H Δᵀ in each row; not always lower than it was.

    product: Δ (out, in) -> Δ H. diagonal: of H, (in,) or (out, in).
    """
    q = fmt.decode(codes, grid)
    pull = product(w - q)
    target = q + torch.where(diagonal > 0, pull / diagonal, 0.0)
    other, value = neighbours(fmt, codes, grid, target)
    gap = value - q
    share = torch.where(gap != 0, (target - q) / torch.where(gap != 0, gap, 1.0), 0.0)
    v = opened(share)
    errors = ((w - q) * pull).sum(1, keepdim=True)
    unit = torch.where(errors > 0, w.shape[1] / errors.clamp(min=1e-30), 0.0)
    mean, square = torch.zeros_like(v), torch.zeros_like(v)
    low, high = STRETCH
    for step in range(steps):
        s = torch.sigmoid(v)
        raw = s * (high - low) + low
        h = raw.clamp(0, 1)
        slope = ((raw > 0) & (raw < 1)) * s * (1 - s) * (high - low)
        gradient = -2 * product(w - q - h * gap) * gap * unit
        power = exponent(step, steps)
        if power is not None:
            y = 2 * h - 1
            gradient -= WEIGHT * 2 * power * y.abs().pow(power - 1) * y.sign()
        gradient *= slope
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient.square()
        size = (square / (1 - 0.99 ** (step + 1))).sqrt() + 1e-12
        v = v - RATE * (mean / (1 - 0.9 ** (step + 1))) / size
    return torch.where(openness(v) > 0.5, other, codes)
