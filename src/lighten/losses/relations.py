"""Relations: distances and angles between the examples of a batch, whatever the widths.

*Source:* Park et al. 2019, "Relational knowledge distillation", section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from lighten.registry import losses
from lighten.seen import EMBEDDINGS, Seen, embeddings, one_of, unit, within


@losses("relations")
@dataclass(frozen=True)
class Relations:
    """Distances of pairs and angles of triples of examples: Huber loss between the two networks.

    distance, angle: their weights; distances count in units of their mean. on: hidden (the deepest
    place) or outputs; the mean over positions, where there are any. Memory is batch³ for the angle.
    """

    distance: float = 1.0
    angle: float = 2.0
    on: str = "hidden"
    source: ClassVar[str] = "Park et al. 2019"
    floor: ClassVar[float | None] = 0.0
    taught: ClassVar[bool] = True

    def __post_init__(self) -> None:
        within("relations", "distance", self.distance, 0, 1e6)
        within("relations", "angle", self.angle, 0, 1e6)
        one_of("relations", "on", self.on, EMBEDDINGS)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hidden"}) if self.on == "hidden" else frozenset()

    def __call__(
        self,
        student: Seen,
        teacher: Seen,
        labels: Tensor | None = None,
        parts: nn.Module | None = None,
    ) -> Tensor:
        s, t = embeddings(student, teacher, self.on)
        n = len(s)
        total = s.sum() * 0  # an example on its own has no relations
        if n > 1 and self.distance:
            pairs = _huber(_distances(s), _distances(t))
            total = total + self.distance * pairs / (n * (n - 1))
        if n > 2 and self.angle:
            triples = _huber(_angles(s), _angles(t))
            total = total + self.angle * triples / (n * (n - 1) * (n - 2))
        return total


def _huber(a: Tensor, b: Tensor) -> Tensor:
    return F.smooth_l1_loss(a, b, reduction="sum")


def _distances(x: Tensor) -> Tensor:
    """(n, n): of all pairs, in units of their mean; 0 on the diagonal."""
    # by differences: the matrix product cancels where examples are near each other
    square = (x.unsqueeze(0) - x.unsqueeze(1)).square().sum(-1)
    apart = square > 0  # the root has no gradient at 0
    found = square.where(apart, 1).sqrt() * apart
    mean = found.sum() / (len(x) * (len(x) - 1))
    return found / mean.clamp(min=1e-12)


def _angles(x: Tensor) -> Tensor:
    """(n, n, n): at [j, i, k] the cosine of the angle at j between i and k; 0 where one is j, and 1
    in both networks where i is k."""
    side = unit(x.unsqueeze(0) - x.unsqueeze(1))  # [j, i] = from j to i
    return side @ side.transpose(1, 2)
