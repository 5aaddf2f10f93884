"""Muon: a weight moves by the orthogonal matrix that is nearest to its momentum.

    m ← μ m + (1 - μ) g,    u = orthogonal((1 - μ) g + μ m),    w ← w - rate ‖w₀‖ u / ‖u‖

All directions of a momentum count alike, where SGD follows the few that are large. The rate is a
share of the length that a weight began with, so one rate means the same for all of them. Vectors
and scalars (norms, biases) have no directions to make alike: they move as by AdamW.

*Source:* Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (the
iteration and its coefficients; AdamW for vectors); You et al. 2017 (LARS, arXiv 1708.03888),
section 4: rates relative to a weight's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM, SQUARES = 0.95, 0.95
"""Of gradients (vectors: 0.9) and of their squares."""

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Singular values between 0.05 and 1 come to lie between 0.7 and 1.2."""


class Muon(torch.optim.Optimizer):
    """Options of a group: lr, weight_decay (decoupled, times the rate)."""

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate = group["lr"]
            for weight in group["params"]:
                gradient = weight.grad
                if gradient is None:
                    continue
                if group["weight_decay"]:
                    weight.mul_(1 - rate * group["weight_decay"])
                if weight.ndim > 1:
                    self._matrix(weight, gradient, rate)
                else:
                    self._vector(weight, gradient, rate)
        return loss

    def _matrix(self, weight: Tensor, gradient: Tensor, rate: float) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
            # a weight that begins as zeros takes steps as if its rows had length 1
            length = weight.norm()
            state["length"] = torch.where(length > 0, length, len(weight) ** 0.5)
        kept = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        update = orthogonal(gradient.lerp(kept, MOMENTUM).flatten(1)).view(weight.shape)
        weight.sub_(update * (rate * state["length"] / update.norm().clamp(min=1e-7)))

    def _vector(self, weight: Tensor, gradient: Tensor, rate: float) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        state["step"] += 1
        count = float(state["step"])
        mean = state["exp_avg"].lerp_(gradient, 0.1)
        squares = state["exp_avg_sq"].lerp_(gradient.square(), 1 - SQUARES)
        size = (squares / (1 - SQUARES**count)).sqrt().add_(1e-8)
        weight.addcdiv_(mean, size, value=-rate / (1 - 0.9**count))


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearly U Vᵀ of matrix = U S Vᵀ (rows, columns): singular values near 1, zeros stay zeros."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
