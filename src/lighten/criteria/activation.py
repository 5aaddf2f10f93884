"""How strong an output is on the data.

*Source:* Molchanov et al. 2017, "Pruning convolutional neural networks for resource efficient
inference", section 2.2, "Activation" (there the mean after the nonlinearity; here the mean square
before it, which H has).
"""

from __future__ import annotations

from torch import Tensor

from lighten.checked import by_group, finite, needed, of_outputs, spread
from lighten.registry import criteria
from lighten.types import Stats


@criteria("activation")
@of_outputs
def activation(weight: Tensor, stats: Stats | None = None) -> Tensor:
    """diag(W H Wᵀ), the mean square of each output without its bias, spread over its row."""

    def judge(rows: Tensor, hessian: Tensor) -> Tensor:
        return spread(((rows @ hessian) * rows).sum(1).clamp(min=0), rows)

    return by_group(finite("activation", weight), needed("activation", stats, "hessian"), judge)
