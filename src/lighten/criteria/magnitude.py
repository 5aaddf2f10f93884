"""The size of a weight, which needs no data.

*Source:* Li et al. 2017, "Pruning filters for efficient convnets", section 3.1 (l1).
"""

from __future__ import annotations

from torch import Tensor

from lighten.checked import finite
from lighten.registry import criteria
from lighten.types import Stats


@criteria("l1")
def l1(weight: Tensor, stats: Stats | None = None) -> Tensor:
    """|w|."""
    return finite("l1", weight).abs()


@criteria("l2")
def l2(weight: Tensor, stats: Stats | None = None) -> Tensor:
    """w²: summed over a slice, its squared length."""
    return finite("l2", weight).square()
