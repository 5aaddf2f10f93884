"""What the batch norm behind an output multiplies it by.

*Source:* Liu et al. 2017, "Learning efficient convolutional networks through network slimming",
section 3 (there after training with a penalty that drives scales to zero).
"""

from __future__ import annotations

from torch import Tensor

from lighten.checked import finite, needed, of_outputs, spread
from lighten.registry import criteria
from lighten.types import Stats


@criteria("batchnorm")
@of_outputs
def batchnorm(weight: Tensor, stats: Stats | None = None) -> Tensor:
    """|scale| of the output, spread over its row; needs stats.scale."""
    scale = needed("batchnorm", stats, "scale")
    return spread(scale.abs(), finite("batchnorm", weight))
