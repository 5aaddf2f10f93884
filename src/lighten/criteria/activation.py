"""How strong an output is on the data.

*Source:* Molchanov et al. 2017, "Pruning convolutional neural networks for resource efficient
inference", section 2.2, "Activation" (there the mean after the nonlinearity; here the mean square
before it, which H has).
"""

from __future__ import annotations

from torch import Tensor

from lighten.checked import finite, needed, of_outputs, spread
from lighten.registry import criteria
from lighten.types import Stats


@criteria("activation")
@of_outputs
def activation(weight: Tensor, stats: Stats | None = None) -> Tensor:
    """diag(W H Wᵀ), the mean square of each output without its bias, spread over its row."""
    hessian = needed("activation", stats, "hessian").to(finite("activation", weight))
    return spread(((weight @ hessian) * weight).sum(1).clamp(min=0), weight)
