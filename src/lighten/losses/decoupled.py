"""Decoupled: the teacher's certainty of one class, and its opinion of all others, apart.

*Source:* Zhao et al. 2022, "Decoupled knowledge distillation", equations 5 to 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lighten.registry import losses
from lighten.seen import (
    IGNORED,
    Seen,
    checked_labels,
    log_probabilities,
    one_of,
    same_logits,
    within,
)


@losses("decoupled")
@dataclass(frozen=True)
class Decoupled:
    """KL divergence in two parts: one class against the rest, and among the rest.

    T² (alpha KL(b_t ‖ b_s) + beta KL(o_t ‖ o_s)): b is (p of the class, 1 - p), o the softmax of
    all others. In `logits` beta would be 1 - p of the teacher: next to 0 where it is sure. target:
    which class that is: the label, or the one that the teacher finds likeliest (needs no labels).
    """

    temperature: float = 4.0
    alpha: float = 1.0
    beta: float = 2.0
    target: str = "label"
    source: ClassVar[str] = "Zhao et al. 2022"
    floor: ClassVar[float | None] = 0.0
    taught: ClassVar[bool] = True

    def __post_init__(self) -> None:
        within("decoupled", "temperature", self.temperature, 1e-3, 1e3)
        within("decoupled", "alpha", self.alpha, 0, 1e6)
        within("decoupled", "beta", self.beta, 0, 1e6)
        one_of("decoupled", "target", self.target, ("label", "teacher"))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"labels"} if self.target == "label" else ())

    def __call__(
        self,
        student: Seen,
        teacher: Seen,
        labels: Tensor | None = None,
        parts: nn.Module | None = None,
    ) -> Tensor:
        s, t = same_logits(student, teacher, "decoupled")
        if self.target == "teacher":
            target = t.argmax(1)
        else:
            target = checked_labels(student.outputs, labels, "decoupled")
        kept = target != IGNORED
        label = torch.where(kept, target, 0).unsqueeze(1)
        q, q_others = _split(s / self.temperature, label)
        p, p_others = _split(t / self.temperature, label)
        weight = kept / kept.sum().clamp(min=1)  # a mean over the rows that have a class
        certain = (weight * (p.exp() * (p - q)).sum(1)).sum()
        others = (weight * (p_others.exp() * (p_others - q_others)).sum(1)).sum()
        return self.temperature**2 * (self.alpha * certain + self.beta * others)


def _split(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (rows, 2) of the label and of all others together; (rows, classes) among
    the others."""
    others = logits.scatter(1, label, -1e30)
    both = torch.cat([logits.gather(1, label), others.logsumexp(1, keepdim=True)], 1)
    return log_probabilities(both), log_probabilities(others)
