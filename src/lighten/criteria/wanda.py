"""Size of a weight times that of its input.

*Source:* Sun et al. 2023, "A simple and effective pruning approach for large language models",
equation 1.
"""

from __future__ import annotations

from torch import Tensor

from lighten.checked import finite, needed
from lighten.registry import criteria
from lighten.types import Stats


@criteria("wanda")
def wanda(weight: Tensor, stats: Stats | None = None) -> Tensor:
    """|w| sqrt(H_jj)."""
    hessian = needed("wanda", stats, "hessian").to(finite("wanda", weight))
    return weight.abs() * hessian.diagonal().clamp(min=0).sqrt()
