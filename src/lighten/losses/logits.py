"""Soft logits: the teacher's probabilities of all classes, at a temperature.

*Source:* Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network", section 2;
forward and reverse: Gu et al. 2023, "MiniLLM", section 2.1; js: Agarwal et al. 2023, "On-policy
distillation of language models", section 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

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
        if self.direction == "forward" and not t.requires_grad:
            found: Tensor = _Forward.apply(s, t, self.temperature)  # type: ignore[no-untyped-call]
            return found
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


class _Forward(torch.autograd.Function):
    """T² KL(teacher ‖ student), its gradient T (q - p) taken on the way.

    Where the vocabulary is large every pass over the logits counts, and autograd makes twice as
    many.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, temperature: float) -> Tensor:
        log_p, log_q = (
            log_probabilities(z if temperature == 1.0 else z / temperature) for z in (t, s)
        )
        p = log_p.exp()
        loss = temperature**2 * torch.linalg.vecdot(p, log_p.sub_(log_q)).mean()
        count = max(p[..., 0].numel(), 1)
        ctx.save_for_backward(log_q.exp_().sub_(p).mul_(temperature / count))
        return loss  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * gradients[0], None, None
