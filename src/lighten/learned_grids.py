"""Grids that can learn: of a weight, its steps and codes; of an edge, its step and zero point.

See lighten.trainable for what is learned and in which units.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lighten.errors import WrongUse
from lighten.quantized import Edge
from lighten.types import Compressed

CODES = 8.0
"""How many codes a parameter of 1 is worth, where a step's parameter of 1 is a factor of e."""

NEAR = 0.25
"""Codes that a weight may lie beside its code at the beginning: it turns at half a code."""


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, its gradient that of `value`."""
    return rounded.detach() + (value - value.detach())


class WeightGrid(nn.Module):
    """A weight (out, in) of integers with a scale for each row or group.

    dense: learn the codes as well: what turns first are those that the float weight, (out, in), is
    far from; where it is zero and so is the code, the weight was pruned, and both stay. None: keep
    them.
    """

    def __init__(self, name: str, weight: Compressed, dense: Tensor | None = None) -> None:
        super().__init__()
        format: Any = weight.format
        start, grid = format.unpack(weight.parts, weight.shape)
        if not hasattr(format, "code_bits") or set(grid) - {"scale", "zero"} or "scale" not in grid:
            raise WrongUse(
                f"`{name}` is {format.name}, whose steps cannot be learned here",
                "integers with a scale: int8_channel_sym, int4_g128 and the like",
            )
        self.weight = weight
        self.format = format
        self.last = (1 << format.code_bits) - 1
        self.width = format.block or weight.shape[1]
        self.group = weight.shape[0], grid["scale"].shape[1], self.width
        zero = grid.get("zero", torch.full_like(grid["scale"], self.last // 2 + 1))
        self.start: Tensor
        self.scale0: Tensor
        self.middle: Tensor
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("scale0", grid["scale"], persistent=False)
        self.register_buffer("middle", zero, persistent=False)
        self.scale = nn.Parameter(torch.zeros_like(grid["scale"]))
        self.codes: nn.Parameter | None = None
        self.beside: Tensor | None
        self.register_buffer("beside", None, persistent=False)
        self.stays: Tensor | None
        self.register_buffer("stays", None, persistent=False)
        if dense is not None:
            self.codes = nn.Parameter(torch.zeros(weight.shape).to(zero))
            step = grid["scale"].unsqueeze(2)
            level = start.view(self.group).float() - zero.unsqueeze(2)
            beside = dense.reshape(self.group) / torch.where(step > 0, step, 1.0) - level
            beside = torch.clamp(level + beside.clamp(-NEAR, NEAR), *self._ends()) - level
            self.beside = beside
            self.stays = (level != 0) | (dense.reshape(self.group) != 0)
        self.factor = 1 / math.sqrt(self.width * max(self.last // 2, 1))

    def scales(self) -> Tensor:
        """(out, groups), as they are stored; gradients are scaled."""
        p = _slowed(self.scale, self.factor)
        value = self.scale0 * p.exp()
        settled = self.format.settle("scale", value.detach())
        # a scale that rounds to 0 would lose its row for good
        return straight(value, torch.where(settled > 0, settled, self.scale0))

    def levels(self) -> tuple[Tensor, Tensor]:
        """Codes minus zero (out, groups, width), whole but with a gradient; scales (out, groups,
        1)."""
        scale, zero = self.scales().unsqueeze(2), self.middle.unsqueeze(2)
        level = self.start.view(self.group).float() - zero
        if self.codes is not None and self.beside is not None and self.stays is not None:
            wanted = level + self.beside + CODES * self.codes.view(self.group)
            safe = torch.where(scale > 0, scale, 1.0)
            wanted = wanted * torch.where(scale > 0, self.scale0.unsqueeze(2) / safe, 1.0)
            wanted = torch.clamp(wanted, *self._ends())
            level = straight(wanted, wanted.round()) * self.stays
        return level, scale

    def _ends(self) -> tuple[Tensor, Tensor]:
        """The first and the last level (out, groups, 1)."""
        zero = self.middle.unsqueeze(2)
        return -zero, self.last - zero

    def forward(self) -> Tensor:
        level, scale = self.levels()
        return (level * scale).view(self.weight.shape)

    def compressed(self) -> Compressed:
        """The weight as it is now."""
        level, scale = self.levels()
        codes = (level + self.middle.unsqueeze(2)).round().to(torch.uint8).view(self.weight.shape)
        grid = {"scale": scale.squeeze(2)}
        if not self.format.symmetric:
            grid["zero"] = self.middle
        spec, shape = self.weight.spec, self.weight.shape
        return Compressed(spec, shape, self.format, self.format.pack(codes, grid))


class EdgeGrid(nn.Module):
    """A quantizer of a tensor. low, high: numbers that the edge may not reach beyond, or None."""

    def __init__(self, edge: Edge, low: float | None = None, high: float | None = None) -> None:
        super().__init__()
        self.start = edge
        self.two_sided = edge.first < edge.zero < edge.last
        most = math.inf
        if high is not None and high > 0 and edge.last > edge.zero:
            most = min(most, high / (edge.last - edge.zero))
        if low is not None and low < 0 and edge.first < edge.zero:
            most = min(most, low / (edge.first - edge.zero))
        self.most = _down(most) if most >= edge.scale else edge.scale
        self.scale = nn.Parameter(torch.zeros(()))
        self.zero = nn.Parameter(torch.zeros(()))

    def steps(self) -> Tensor:
        """The scale, a scalar."""
        return (self.start.scale * self.scale.exp()).clamp(max=self.most)

    def zeros(self) -> Tensor:
        """The zero point, a whole number with a gradient."""
        # the bounds of a clip hold for the zero point that was given
        wanted = self.start.zero + CODES * self.zero
        wanted = wanted.clamp(self.start.first, self.start.last)
        return straight(wanted, wanted.round())

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.start.first, self.start.last
        factor = 1 / math.sqrt(max(x[:1].numel(), 1) * (last - first))
        apply: Any = _Rounded.apply
        found: Tensor = apply(x, self.steps(), self.zeros(), first, last, factor)
        return found

    def edge(self) -> Edge:
        """The quantizer as it is now."""
        start = self.start
        return Edge(float(self.steps()), round(float(self.zeros())), start.bits, start.signed)


class _Rounded(torch.autograd.Function):
    """Round to a grid. In the gradient every pass over the tensor counts, so there are few."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, first: int, last: int, factor: float
    ) -> Tensor:
        code = torch.div(x, scale).round_().add_(zero).clamp_(first, last)
        out = code.sub_(zero).mul_(scale)
        ctx.save_for_backward(x, out, scale, zero)  # readers keep `out` as well
        ctx.given = first, last, factor
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, out, scale, zero = ctx.saved_tensors
        first, last, factor = ctx.given
        low, high = (first - 0.5 - zero) * scale, (last + 0.5 - zero) * scale
        inside = torch.ops.aten.hardtanh_backward(gradient, x, float(low), float(high))
        clipped = gradient - inside
        to_scale = to_zero = None
        if ctx.needs_input_grad[1]:
            total = (inside * (out - x)).sum() + (clipped * out).sum()
            to_scale = total * (factor / scale)
        if ctx.needs_input_grad[2]:
            to_zero = clipped.sum() * (-scale * factor)
        return inside, to_scale, to_zero, None, None, None


def _slowed(p: Tensor, factor: float) -> Tensor:
    """p, its gradient times factor."""
    return straight(p * factor, p)


def _down(value: float) -> float:
    """The nearest single-precision number that is not above."""
    near = torch.tensor(value, dtype=torch.float32)
    if float(near) > value:
        near = torch.nextafter(near, torch.tensor(0.0))
    return float(near)
