"""Ridge regression of a weight on rows of inputs, with targets that are free where cut off."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Tried beside the one asked for where rows are few."""

FEW = 24
"""Rows for each column: with fewer, the ridge is chosen on rows that were left out."""


@dataclass(frozen=True, eq=False)
class Problem:
    """x: (groups, rows, in). target: (rows, out). other: (rows, out), added to the fit before it is
    cut off to low..high; the target is that of the sum."""

    x: Tensor
    target: Tensor
    other: Tensor | None = None
    low: float = -math.inf
    high: float = math.inf

    def part(self, rows: slice) -> Problem:
        other = None if self.other is None else self.other[rows]
        return Problem(self.x[:, rows], self.target[rows], other, self.low, self.high)

    def grouped(self, t: Tensor) -> Tensor:
        """(rows, out) -> (groups, rows, out / groups)."""
        return t.reshape(len(t), len(self.x), -1).transpose(0, 1)

    def predict(self, weight: Tensor, bias: Tensor) -> Tensor:
        """(rows, out): the fit, and the other summand."""
        w = weight.view(len(self.x), -1, weight.shape[1])
        fitted: Tensor = (self.x @ w.transpose(1, 2)).transpose(0, 1).flatten(1) + bias
        return fitted if self.other is None else fitted + self.other

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Mean squared error of what is left after the cut."""
        gap = self.predict(weight, bias).clamp(self.low, self.high)
        return float((gap - self.target.clamp(self.low, self.high)).square().mean())


def fit(
    problem: Problem, start: Tensor, ridge: float, rounds: int = 0, free: bool = True
) -> tuple[Tensor, Tensor]:
    """(weight (out, in), bias (out,)): least squares drawn towards `start` (out, in).

    ridge: times the mean of diag(X Xᵀ / rows); where rows are few, more if that is better on a
    fifth of the rows that is left out. rounds: how often the targets that are cut off are put where
    the fit lies. free: whether there may be a bias; else it is 0.
    """
    rows = problem.x.shape[1]
    if rows < FEW * problem.x.shape[2]:
        cut = max(1, rows - rows // 5)
        inside, outside = problem.part(slice(0, cut)), problem.part(slice(cut, rows))
        tried = (ridge, *(r for r in RIDGES if r > ridge))
        scores = [outside.error(*_solve(inside, start, r, 0, free)) for r in tried]
        ridge = tried[min(range(len(tried)), key=scores.__getitem__)]
    return _solve(problem, start, ridge, rounds, free)


def _solve(
    p: Problem, start: Tensor, ridge: float, rounds: int, free: bool
) -> tuple[Tensor, Tensor]:
    n = p.x.shape[1]
    mean = p.x.mean(1, keepdim=True) if free else torch.zeros_like(p.x[:, :1])
    x = p.x - mean
    gram = (x.transpose(1, 2) @ x).double() / n
    size = (ridge * gram.diagonal(dim1=1, dim2=2).mean(1)).clamp(min=1e-12).view(-1, 1, 1)
    damped = gram + size * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(damped)
    pull = size * start.double().view(len(x), -1, start.shape[1]).transpose(1, 2)
    cut = math.isfinite(p.low) or math.isfinite(p.high)
    target = p.target
    weight = bias = start
    for turn in range(1 + (rounds if cut else 0)):
        if turn:
            target = _where_free(p, p.predict(weight, bias))
        aim = target if p.other is None else target - p.other
        middle = aim.mean(0) if free else torch.zeros_like(aim[0])
        cross = (x.transpose(1, 2) @ p.grouped(aim - middle)).double() / n
        solved = torch.cholesky_solve(cross + pull, factor).float()
        weight = solved.transpose(1, 2).flatten(0, 1)
        moved = (solved.transpose(1, 2) @ mean.transpose(1, 2)).flatten()
        bias = middle - moved if free else torch.zeros_like(middle)
    return weight, bias


def _where_free(p: Problem, fitted: Tensor) -> Tensor:
    """Targets beyond the cut put at the fit, or at the cut where the fit is on the wrong side."""
    below = torch.where(p.target <= p.low, fitted.clamp(max=p.low), p.target)
    return torch.where(p.target >= p.high, fitted.clamp(min=p.high), below)
