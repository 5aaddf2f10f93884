"""Size of a weight times that of its input.

*Source:* Sun et al. 2023, "A simple and effective pruning approach for large language models",
equation 1.
"""

from __future__ import annotations

from torch import Tensor

from lighten.checked import by_group, finite, needed
from lighten.registry import criteria
from lighten.types import Stats


@criteria("wanda")
def wanda(weight: Tensor, stats: Stats | None = None) -> Tensor:
    """|w| sqrt(H_jj)."""

    def judge(rows: Tensor, hessian: Tensor) -> Tensor:
        return rows.abs() * hessian.diagonal().clamp(min=0).sqrt()

    return by_group(finite("wanda", weight), needed("wanda", stats, "hessian"), judge)
