"""An exponential moving average of the weights, often better than the last of them.

*Source:* Polyak & Juditsky 1992; Tarvainen & Valpola 2017, "Mean teachers", section 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lighten.sharding import share_of


class MovingAverage:
    """a <- d a + (1 - d) w after each step, d = min(decay, (1 + n) / (10 + n)) at step n, so that
    the first steps do not weigh for ever. Running statistics of norms are averaged too."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {k: v.detach().clone() for k, v in _floats(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after `step` steps."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in _floats(module).items():
            self.values[name].lerp_(value, share)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.copy_(share_of(values[name], value))

    @contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        """The module with the averages in place of its weights, for as long as this lasts."""
        held = {k: v.detach().clone() for k, v in _floats(module).items()}
        _put(module, self.values)
        try:
            yield
        finally:
            _put(module, held)


def _floats(module: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in module.state_dict().items() if v.is_floating_point()}


@torch.no_grad()
def _put(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, tensor in _floats(module).items():
        tensor.copy_(values[name])
