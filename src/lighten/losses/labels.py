"""Hard labels: cross entropy.

*Source:* label smoothing: Szegedy et al. 2015, "Rethinking the Inception architecture", section 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from lighten.registry import losses
from lighten.seen import IGNORED, Seen, checked_labels, rows, within


@losses("labels")
@dataclass(frozen=True)
class Labels:
    """Cross entropy with the labels of the data: no teacher needed.

    smoothing: that share of the target is spread over all classes. A label of -100 is left out.
    """

    smoothing: float = 0.0
    source: ClassVar[str] = "Szegedy et al. 2015 (smoothing)"
    needs: ClassVar[frozenset[str]] = frozenset({"labels"})
    floor: ClassVar[float | None] = None
    taught: ClassVar[bool] = False

    def __post_init__(self) -> None:
        within("labels", "smoothing", self.smoothing, 0, 0.999)

    def __call__(
        self,
        student: Seen,
        teacher: Seen | None = None,
        labels: Tensor | None = None,
        parts: nn.Module | None = None,
    ) -> Tensor:
        target = checked_labels(student.outputs, labels, "labels")
        total = F.cross_entropy(
            rows(student.outputs),
            target,
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.smoothing,
        )
        return total / (target != IGNORED).sum().clamp(min=1)
