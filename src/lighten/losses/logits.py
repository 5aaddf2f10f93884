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

CACHED = 2**19
"""Logits at a time on a CPU: 2 MB, of which about four stand at once."""


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
    many. On a CPU they go some rows at a time, which stay in its cache from pass to pass.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, temperature: float) -> Tensor:
        classes = s.shape[-1]
        rows, like = s.reshape(-1, classes), t.reshape(-1, classes)
        count = max(len(rows), 1)
        size = max(1, CACHED // classes) if s.device.type == "cpu" else count
        slope, total = torch.empty_like(rows), rows.new_zeros(())
        parts = [torch.split(x, size) for x in (rows, like, slope)]
        for z, target, out in zip(*parts, strict=True):
            log_p, log_q = (
                log_probabilities(x if temperature == 1.0 else x / temperature) for x in (target, z)
            )
            p = log_p.exp()
            total += torch.linalg.vecdot(p, log_p.sub_(log_q)).sum()
            torch.sub(log_q.exp_(), p, out=out)
        ctx.save_for_backward(slope.view_as(s))
        ctx.scale = temperature / count
        return temperature**2 * total / count

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * (gradients[0] * ctx.scale), None, None
