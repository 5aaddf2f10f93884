"""What removing a weight costs once all others of its row have made up for it.

*Source:* Hassibi and Stork 1993, "Second order derivatives for network pruning: optimal brain
surgeon", equation 5, with H = X Xᵀ / n of the layer's inputs.
"""

from __future__ import annotations

from torch import Tensor

from lighten.checked import by_group, finite, needed
from lighten.registry import criteria
from lighten.sweep import Factor
from lighten.types import Stats


@criteria("obs")
def obs(weight: Tensor, stats: Stats | None = None) -> Tensor:
    """w² / [H⁻¹]_jj, H damped."""

    def judge(rows: Tensor, hessian: Tensor) -> Tensor:
        return rows.square() / Factor.of(hessian).upper.square().sum(0)

    return by_group(finite("obs", weight), needed("obs", stats, "hessian"), judge)
