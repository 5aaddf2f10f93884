"""What the loss says of a weight, to the first and to the second order.

*Source:* Molchanov et al. 2019, "Importance estimation for neural network pruning" (there squared,
batch by batch); LeCun et al. 1990, "Optimal brain damage", with squared gradients as curvature.
"""

from __future__ import annotations

from torch import Tensor

from lighten.checked import finite, needed
from lighten.registry import criteria
from lighten.types import Stats


@criteria("taylor1")
def taylor1(weight: Tensor, stats: Stats | None = None) -> Tensor:
    """|w g|, g the mean gradient: how the loss changes to first order where w goes.

    g wants true labels or a loss of the user's: of labels drawn from the network it is near zero.
    """
    return (finite("taylor1", weight) * needed("taylor1", stats, "slope").to(weight)).abs()


@criteria("taylor2")
def taylor2(weight: Tensor, stats: Stats | None = None) -> Tensor:
    """w² E[g²] / 2, in nats where the loss is a log likelihood."""
    curvature = needed("taylor2", stats, "curvature").to(finite("taylor2", weight))
    return 0.5 * weight.square() * curvature
