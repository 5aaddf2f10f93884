"""What the patterns are made of: their table, their layers, and a module around a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Pattern:
    """free: axis -> width, of all that are not locked. own: the module's own class survives;
    None: that depends on which units go."""

    make: Callable[[], Made]
    free: dict[str, int]
    own: bool | None


PATTERNS: dict[str, Pattern] = {}


def pattern(
    free: dict[str, int], own: bool | None = True
) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    def add(build: Callable[[], Made]) -> Callable[[], Made]:
        def make() -> Made:
            state = torch.random.get_rng_state()
            try:
                torch.manual_seed(0)
                module, inputs = build()
                return lively(module), inputs
            finally:
                torch.random.set_rng_state(state)

        PATTERNS[build.__name__] = Pattern(make, free, own)
        return make

    return add


def lively(module: nn.Module) -> nn.Module:
    """Biases, norms and running statistics moved off 0 and 1, so that a lost one shows."""
    with torch.no_grad():
        for name, t in (*module.named_parameters(), *module.named_buffers()):
            if not t.is_floating_point():
                continue
            if name.endswith("running_var"):
                t.uniform_(0.5, 2)
            elif t.dim() <= 1 and "freq" not in name:
                t.add_(torch.randn_like(t) * 0.2)
    return module.eval()


def conv(i: int, o: int, k: int = 3, groups: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, groups=groups, bias=bias)


def image(channels: int = 3, size: int = 8, batch: int = 2) -> tuple[Tensor, ...]:
    return (torch.randn(batch, channels, size, size),)


def tokens() -> tuple[Tensor, ...]:
    return (torch.randn(2, 5, 16),)


class Run(nn.Module):
    """A module whose forward is a function of it."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)
