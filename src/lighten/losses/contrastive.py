"""Contrastive: tell the teacher's view of an example from its views of all others in the batch.

*Source:* Tian et al. 2019, "Contrastive representation distillation", section 3.1; the estimator
within a batch: van den Oord et al. 2018, "Representation learning with contrastive predictive
coding", equation 4.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lighten.registry import losses
from lighten.seen import EMBEDDINGS, Seen, embeddings, one_of, trained_part, unit, within


@losses("contrastive")
@dataclass(frozen=True)
class Contrastive:
    """InfoNCE within the batch, on embeddings of both networks that are learned beside the student.

    Cross entropy of softmax(e(s_i)·e(t_j) / tau) with j = i, and the other way round, the mean of
    both. width: of the embeddings. on: hidden (the deepest place) or outputs.
    """

    tau: float = 0.1
    width: int = 128
    on: str = "hidden"
    source: ClassVar[str] = "Tian et al. 2019"
    floor: ClassVar[float | None] = None
    taught: ClassVar[bool] = True

    def __post_init__(self) -> None:
        within("contrastive", "tau", self.tau, 1e-3, 1e3)
        within("contrastive", "width", self.width, 1, 65536)
        one_of("contrastive", "on", self.on, EMBEDDINGS)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hidden"}) if self.on == "hidden" else frozenset()

    def start(self, student: Seen, teacher: Seen) -> nn.Module | None:
        s, t = embeddings(student, teacher, self.on)
        seer = nn.Linear(s.shape[1], self.width)
        # networks of one width start with one embedding: alike is then alike from the first step
        alike = s.shape[1] == t.shape[1]
        shown = copy.deepcopy(seer) if alike else nn.Linear(t.shape[1], self.width)
        return nn.ModuleDict({"student": seer, "teacher": shown})

    def __call__(
        self,
        student: Seen,
        teacher: Seen,
        labels: Tensor | None = None,
        parts: nn.Module | None = None,
    ) -> Tensor:
        s, t = embeddings(student, teacher, self.on)
        s = unit(trained_part("contrastive", parts, "student")(s))
        t = unit(trained_part("contrastive", parts, "teacher")(t))
        alike = s @ t.T / self.tau
        own = torch.arange(len(s), device=s.device)
        return (F.cross_entropy(alike, own) + F.cross_entropy(alike.T, own)) / 2
