"""Outputs as numbers: for networks that give no classes but a measure, a place, an image.

*Source:* Ba and Caruana 2014, "Do deep nets really need to be deep?", equation 1 (squared error of
outputs), here as a share of how much the teacher's vary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lighten.registry import losses
from lighten.seen import Seen, same_outputs

_CONSTANT = 1e-8
"""Variance over mean square below which outputs do not vary: 1 part in 10,000, well above what
float32 rounds."""


@losses("outputs")
@dataclass(frozen=True)
class Outputs:
    """Squared error of the outputs, as a share of the teacher's variance: no classes needed.

    Σ (s − t)² / Σ (t − t̄)² over the batch and positions; t̄ is the mean over both, for each number
    of an output. Where the teacher's do not vary (one example, a constant) it is a share of Σ t².
    """

    source: ClassVar[str] = "Ba and Caruana 2014"
    needs: ClassVar[frozenset[str]] = frozenset()
    floor: ClassVar[float | None] = 0.0
    taught: ClassVar[bool] = True

    def __call__(
        self,
        student: Seen,
        teacher: Seen,
        labels: Tensor | None = None,
        parts: nn.Module | None = None,
    ) -> Tensor:
        s, t = same_outputs(student, teacher)
        known = t.isfinite()  # a masked class is -infinity in both
        gap, t = torch.where(known, s - t, 0), torch.where(known, t, 0)
        square = t.square().sum()
        varies = (t - t.mean(0)).square().sum()
        return gap.square().sum() / torch.where(varies > _CONSTANT * square, varies, square).clamp(
            min=1e-12
        )
