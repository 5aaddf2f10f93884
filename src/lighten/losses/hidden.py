"""Hidden features: directions at places inside the two networks.

*Source:* Romero et al. 2014, "FitNets: hints for thin deep nets", equation 3, here on
features at length 1, so that places count alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lighten.registry import losses
from lighten.seen import Seen, aligned, inverse_length, matched, one_of, trained_part


@losses("hidden")
@dataclass(frozen=True)
class Hidden:
    """Squared distance of features at length 1, the mean over places and positions.

    ‖P s/|P s| − t/|t|‖² over channels. P is none where both are equally wide, else a linear map
    (a 1x1 convolution): project=learned trains it beside the student, project=least_squares fits it
    once, before learning. Where sizes in space differ, the larger is pooled. channels: first, last
    or auto (second of 4 and 5 dimensions, else last). places: all blocks, or the ends of stages
    alone, which is less work.
    """

    project: str = "learned"
    channels: str = "auto"
    places: str = "all"
    source: ClassVar[str] = "Romero et al. 2014"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    floor: ClassVar[float | None] = 0.0
    taught: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of("hidden", "project", self.project, ("learned", "least_squares"))
        one_of("hidden", "channels", self.channels, ("auto", "first", "last"))
        one_of("hidden", "places", self.places, ("all", "ends"))

    def _places(self, student: Seen, teacher: Seen) -> list[tuple[Tensor, Tensor]]:
        found = matched(student.hidden, teacher.hidden, "hidden features")
        return [aligned(name, s, t, self.channels) for name, s, t in found]

    def start(self, student: Seen, teacher: Seen) -> nn.Module | None:
        maps: dict[str, nn.Module] = {}
        for i, (s, t) in enumerate(self._places(student, teacher)):
            if s.shape[-1] == t.shape[-1]:
                continue
            linear = nn.Linear(s.shape[-1], t.shape[-1], bias=False)
            if self.project == "least_squares":
                linear.requires_grad_(False)
                linear.weight.copy_(_fitted(s.flatten(0, -2), t.flatten(0, -2)))
            maps[str(i)] = linear
        return nn.ModuleDict(maps) if maps else None

    def __call__(
        self,
        student: Seen,
        teacher: Seen,
        labels: Tensor | None = None,
        parts: nn.Module | None = None,
    ) -> Tensor:
        total = student.outputs.new_zeros(())
        places = self._places(student, teacher)
        for i, (s, t) in enumerate(places):
            if s.shape[-1] != t.shape[-1]:
                s = trained_part("hidden", parts, str(i))(s)
            total = total + _apart(s, t).mean()
        return total / len(places)


def _apart(s: Tensor, t: Tensor) -> Tensor:
    """‖s/|s| − t/|t|‖² over the last dimension, by three sums over it: what is made at every
    channel of large features, and read again for the gradient, is most of what this loss costs."""
    lengths = s.square().sum(-1), t.square().sum(-1)
    a, b = (inverse_length(each) for each in lengths)
    found = lengths[0] * a.square() + lengths[1] * b.square() - 2 * (s * t).sum(-1) * a * b
    return found.clamp(min=0)  # rounding may end just below


def _fitted(x: Tensor, y: Tensor) -> Tensor:
    """W (out, in) for which x Wᵀ is nearest to y in least squares, with a little ridge."""
    home = x.device
    if home.type == "mps":  # which has no float64
        x, y = x.cpu(), y.cpu()
    x, y = x.double(), y.double()
    gram = x.T @ x
    ridge = 1e-4 * gram.diagonal().mean().clamp(min=1e-12)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    found: Tensor = torch.linalg.solve(gram + ridge * eye, x.T @ y)
    return found.T.float().to(home)
