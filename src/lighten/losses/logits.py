"""Soft logits: the teacher's probabilities of all classes, at a temperature.

*Source:* Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network", section 2;
forward and reverse: Gu et al. 2023, "MiniLLM", section 2.1; js: Agarwal et al. 2023, "On-policy
distillation of language models", section 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lighten.registry import losses
from lighten.seen import Seen, divergence, log_probabilities, one_of, same_logits, within


@losses("logits")
@dataclass(frozen=True)
class Logits:
    """KL divergence from the teacher's probabilities, at a temperature: no labels needed.

    T² D(softmax(t / T), softmax(s / T)); direction: forward is KL(teacher ‖ student), reverse the
    other way round, js the mean of both against their mixture. T² keeps the size of the gradient.
    """

    temperature: float = 1.0
    direction: str = "forward"
    source: ClassVar[str] = "Hinton et al. 2015"
    needs: ClassVar[frozenset[str]] = frozenset()
    floor: ClassVar[float | None] = 0.0
    taught: ClassVar[bool] = True

    def __post_init__(self) -> None:
        within("logits", "temperature", self.temperature, 1e-3, 1e3)
        one_of("logits", "direction", self.direction, ("forward", "reverse", "js"))

    def __call__(
        self,
        student: Seen,
        teacher: Seen,
        labels: Tensor | None = None,
        parts: nn.Module | None = None,
    ) -> Tensor:
        s, t = same_logits(student, teacher, "logits")
        log_q = log_probabilities(s / self.temperature)
        log_p = log_probabilities(t / self.temperature)
        if self.direction == "forward":
            loss = divergence(log_p, log_q)
        elif self.direction == "reverse":
            loss = divergence(log_q, log_p)
        else:
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            loss = (divergence(log_p, log_m) + divergence(log_q, log_m)) / 2
        return self.temperature**2 * loss
