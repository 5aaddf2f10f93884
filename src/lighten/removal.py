"""In which order units of an axis go, when all that read it make up for every loss at once.

Weights W (out, in) read inputs with covariance H. Removing the columns g of a unit and solving the
others again by least squares raises tr(ΔW H ΔWᵀ) by tr(W_g (P_gg)⁻¹ W_gᵀ), P = H⁻¹; then

    W ← W - W_g (P_gg)⁻¹ P_g,:        P ← P - P_:,g (P_gg)⁻¹ P_g,:

are again the best weights and the inverse for what is left, so a greedy order costs one inverse.

*Source:* Hassibi & Stork 1992, "Second order derivatives for network pruning: optimal brain
surgeon", equation 5, for groups of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lighten.errors import BadInput, WrongUse


@dataclass(frozen=True, eq=False)
class Reading:
    """One weight that reads an axis.

    weight: (out, in). covariance: (in, in) of its inputs, symmetric. columns: (width, k): unit i is
    columns[i]; columns of no unit stay. importance: what an output's squared error costs, (out,).
    """

    weight: Tensor
    covariance: Tensor
    columns: Tensor
    importance: Tensor | None = None


def removal(
    readings: Sequence[Reading], ridge: float = 1e-4, at_once: int = 1
) -> tuple[Tensor, Tensor]:
    """(order (width,) int64, first removed first; error (width + 1,) float64 by units kept).

    The error is the sum over readings of tr(ΔW H ΔWᵀ), ΔW solved again after every removal. ridge:
    added to diag(H), times its mean. at_once: units removed between two looks, for wide axes.
    Raises WrongUse where the readings differ in width, BadInput for NaN.
    """
    widths = {len(r.columns) for r in readings}
    if len(widths) != 1:
        raise WrongUse(f"readings of one axis have widths {sorted(widths)}", "one axis, one width")
    width = widths.pop()
    states = [_State(r, ridge) for r in readings]
    alive = torch.ones(width, dtype=torch.bool, device=states[0].w.device)
    order: list[int] = []
    error = torch.zeros(width + 1, dtype=torch.float64)
    while len(order) < width:
        rise = sum((s.rises() for s in states), torch.zeros_like(alive, dtype=torch.float64))
        rise[~alive] = torch.inf
        batch = min(at_once, width - len(order))
        for unit in rise.topk(batch, largest=False).indices.tolist():
            lost = sum(s.remove(unit) for s in states)
            kept = width - len(order) - 1
            error[kept] = error[kept + 1] + lost
            order.append(unit)
            alive[unit] = False
    return torch.tensor(order), error


class _State:
    """A reading's weights and inverse covariance, after the removals so far."""

    def __init__(self, reading: Reading, ridge: float) -> None:
        h = reading.covariance.double()
        h = (h + h.T) / 2
        if not bool(torch.isfinite(h).all()):
            raise BadInput("inputs of a layer hold NaN or infinite values", "is the model damaged?")
        eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
        self.p = torch.linalg.inv(h + max(ridge * float(h.diagonal().mean()), 1e-12) * eye)
        self.w = reading.weight.double().clone()
        if reading.importance is not None:
            self.w *= reading.importance.double().sqrt().unsqueeze(1)
        self.columns = reading.columns.to(h.device)

    def rises(self) -> Tensor:
        """(width,) what removing each unit next would cost; of removed ones, nothing of use."""
        c = self.columns
        inner = self.p[c.unsqueeze(2), c.unsqueeze(1)]  # (width, k, k)
        w = self.w[:, c].transpose(0, 1)  # (width, out, k)
        rise: Tensor = ((w @ torch.linalg.inv(inner)) * w).sum((1, 2))
        return rise

    def remove(self, unit: int) -> float:
        g = self.columns[unit]
        inner = torch.linalg.inv(self.p[g][:, g])
        rows, w = self.p[g].clone(), self.w[:, g].clone()
        lost = float(((w @ inner) * w).sum())
        self.w -= (w @ inner) @ rows
        self.p -= rows.T @ (inner @ rows)
        # gone columns: no weight, and an inverse that stands apart from all others
        self.w[:, g] = 0
        self.p[g] = 0
        self.p[:, g] = 0
        self.p[g, g] = 1
        return lost


def compensated(weight: Tensor, covariance: Tensor, kept: Tensor, ridge: float = 1e-4) -> Tensor:
    """(out, in): the least squares weight that reads only the columns `kept`; others are zero."""
    h = covariance.double()
    damp = max(ridge * float(h.diagonal().mean()), 1e-12)
    rows = h[kept]
    inner = rows[:, kept] + damp * torch.eye(len(kept), dtype=h.dtype, device=h.device)
    target = weight.double() @ rows.T + damp * weight.double()[:, kept]
    found = torch.zeros_like(weight)
    if len(kept):
        found[:, kept] = torch.linalg.solve(inner, target.T).T.to(weight.dtype)
    return found
