"""Where the networks look: attention maps of transformers, attention transfer of CNNs.

*Source:* Jiao et al. 2019, "TinyBERT", equation 7 (maps, squared error); Wang et al. 2020,
"MiniLM", section 3 (maps, KL); Zagoruyko and Komodakis 2017, "Paying more attention to
attention", equation 2 (transfer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lighten.errors import WrongUse
from lighten.registry import losses
from lighten.seen import Seen, aligned, divergence, matched, one_of, unit


@losses("attention")
@dataclass(frozen=True)
class Attention:
    """Attention maps of transformers: distance of the rows that sum to 1.

    metric: kl (teacher ‖ student) or mse (summed over keys). Both are means over places, heads and
    queries; where the numbers of heads differ, heads are averaged first.
    """

    metric: str = "kl"
    source: ClassVar[str] = "Jiao et al. 2019; Wang et al. 2020"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    floor: ClassVar[float | None] = 0.0
    taught: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of("attention", "metric", self.metric, ("kl", "mse"))

    def __call__(
        self,
        student: Seen,
        teacher: Seen,
        labels: Tensor | None = None,
        parts: nn.Module | None = None,
    ) -> Tensor:
        total = student.outputs.new_zeros(())
        places = matched(student.attention, teacher.attention, "attention maps")
        for name, s, t in places:
            if s.dim() != 4 or t.dim() != 4 or s.shape[1] != t.shape[1]:
                s, t = _one_head(s), _one_head(t)
            if s.shape != t.shape:
                raise WrongUse(
                    f"attention maps at `{name}` are {tuple(s.shape)}, the teacher's"
                    f" {tuple(t.shape)}",
                    "both networks must see the same tokens",
                )
            if self.metric == "mse":
                total = total + (s - t).square().sum(-1).mean()
            else:
                # a causal map has zeros, equal in both; a dropped-out one has them anywhere
                total = total + divergence(t.clamp(min=1e-9).log(), s.clamp(min=1e-9).log())
        return total / len(places)


@losses("attention_transfer")
@dataclass(frozen=True)
class AttentionTransfer:
    """Attention transfer of CNNs: where in space features are large, whatever their channels.

    Σ over positions of (a_s/|a_s| − a_t/|a_t|)²; a is the sum of squares over channels. channels as
    in `hidden`; where sizes in space differ, the larger is pooled.
    """

    channels: str = "auto"
    source: ClassVar[str] = "Zagoruyko and Komodakis 2017"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    floor: ClassVar[float | None] = 0.0
    taught: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of("attention_transfer", "channels", self.channels, ("auto", "first", "last"))

    def __call__(
        self,
        student: Seen,
        teacher: Seen,
        labels: Tensor | None = None,
        parts: nn.Module | None = None,
    ) -> Tensor:
        total = student.outputs.new_zeros(())
        places = matched(student.hidden, teacher.hidden, "hidden features")
        for name, x, y in places:
            s, t = aligned(name, x, y, self.channels)
            if s.dim() < 3 or s.shape[1:-1].numel() < 2:
                raise WrongUse(
                    f"features at `{name}` are {tuple(x.shape)}: they have no positions",
                    "name places that still have a height and a width",
                )
            a, b = s.square().sum(-1).flatten(1), t.square().sum(-1).flatten(1)
            total = total + (unit(a) - unit(b)).square().sum(1).mean()
        return total / len(places)


def _one_head(maps: Tensor) -> Tensor:
    return maps.mean(1) if maps.dim() == 4 else maps
