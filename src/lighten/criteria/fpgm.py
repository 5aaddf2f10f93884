"""How far an output's weights are from those of all others: the nearest to the middle go first.

*Source:* He et al. 2019, "Filter pruning via geometric median", section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lighten.checked import finite, of_outputs, spread
from lighten.registry import criteria
from lighten.types import Stats


@criteria("fpgm")
@of_outputs
def fpgm(weight: Tensor, stats: Stats | None = None) -> Tensor:
    """Σ over rows k of |w_i - w_k|, spread over row i: what others nearly say is worth little."""
    rows = finite("fpgm", weight).float()
    return spread(torch.cdist(rows, rows).sum(1), weight)
