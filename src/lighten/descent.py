"""A few parameters are moved by Adam to the best state seen, which may be the one they begin in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

CHECKS = 3
"""Times that a state is judged, beside the one that was given."""


def descend(
    parameters: list[tuple[nn.Parameter, float]],
    cost: Callable[[list[int]], Tensor],
    error: Callable[[], float],
    *,
    count: int,
    batch: int,
    steps: int,
    seed: int,
) -> tuple[float, float]:
    """The error before and after. parameters: with their rates, which fall along a cosine.

    cost: of `batch` of the examples 0 .. count - 1, by number; differentiable. error: of others, by
    which states are judged.
    """
    first = best = error()
    if not parameters:
        return first, best
    kept = [p.detach().clone() for p, _ in parameters]
    groups = [{"params": [p], "lr": rate} for p, rate in parameters]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(steps, 1))
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = torch.randperm(count, generator=generator).tolist()
        at, order = order[:batch], order[batch:]
        loss = cost(at)
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
        cosine.step()
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            now = error()
            if now < best:  # not so where it is NaN
                best, kept = now, [p.detach().clone() for p, _ in parameters]
    with torch.no_grad():
        for (p, _), value in zip(parameters, kept, strict=True):
            p.copy_(value)
    return first, best
