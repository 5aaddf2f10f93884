"""What a weight is multiplied with, at sampled positions: rows of inputs, rows of outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from lighten.network import CONV, LINEAR
from lighten.rewrite import groups, transposed

aten = torch.ops.aten


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution; of a linear, kernel is (). pads: (before, after) each."""

    groups: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    pads: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, node: fx.Node) -> Window | None:
        """A node's geometry; None where it is no linear and no convolution, or transposed."""
        if node.op != "call_function" or transposed(node):
            return None
        if node.target in LINEAR:
            return cls(1)
        weight = node.args[1] if node.target in CONV else None
        if not isinstance(weight, fx.Node):
            return None
        kernel = tuple(int(k) for k in weight.meta["val"].shape[2:])
        given = [*node.args[3:6], None, None, None]
        names = ("stride", "padding", "dilation")
        stride, padding, dilation = (
            node.kwargs.get(k, g) for k, g in zip(names, given, strict=False)
        )
        steps = _each(dilation, len(kernel), 1)
        pads: tuple[tuple[int, int], ...]
        if isinstance(padding, str):
            total = [d * (k - 1) * (padding == "same") for d, k in zip(steps, kernel, strict=True)]
            pads = tuple((t // 2, t - t // 2) for t in total)
        else:
            pads = tuple((p, p) for p in _each(padding, len(kernel), 0))
        return cls(groups(node), kernel, _each(stride, len(kernel), 1), steps, pads)

    def positions(self, y: Tensor, share: float, generator: torch.Generator) -> Tensor:
        """Indices into outputs (batch x space), about `share` of them, as many of each example.

        y: (batch, out, *space), of a linear (..., out).
        """
        count = y.shape[0]
        space = y[0, 0].numel() if self.kernel else y[..., 0].numel() // count
        per = min(space, max(1, math.ceil(share * space)))
        if per == space:
            return torch.arange(count * space, device=y.device)
        chance = torch.rand(count, space, generator=generator)
        picked = chance.topk(per).indices + torch.arange(count).unsqueeze(1) * space
        return picked.flatten().to(y.device)

    def outputs(self, y: Tensor, at: Tensor) -> Tensor:
        """(positions, out) of a node's output."""
        return _channels_last(y, bool(self.kernel)).index_select(0, at)

    def inputs(self, x: Tensor, at: Tensor) -> Tensor:
        """(groups, positions, in), in the order of the stored weight flattened from dimension 1."""
        if not self.kernel:
            return x.reshape(-1, x.shape[-1]).index_select(0, at).unsqueeze(0)
        sizes = [s + a + b for s, (a, b) in zip(x.shape[2:], self.pads, strict=True)]
        out = [
            (size - d * (k - 1) - 1) // s + 1
            for size, d, k, s in zip(sizes, self.dilation, self.kernel, self.stride, strict=True)
        ]
        padded = functional.pad(x, [p for pair in reversed(self.pads) for p in pair])
        flat = _channels_last(padded, True)
        corner, left = torch.zeros_like(at), at
        below = 1
        for size, o, s in reversed(list(zip(sizes, out, self.stride, strict=True))):
            corner = corner + left % o * (s * below)
            left = left // o
            below *= size
        corner = corner + left * below
        taken = [flat.index_select(0, corner + offset) for offset in self._offsets(sizes)]
        rows = torch.stack(taken, -1)  # (positions, channels, kernel)
        return rows.view(len(at), self.groups, -1).transpose(0, 1)

    def _offsets(self, sizes: list[int]) -> list[int]:
        found, below = [0], 1
        for size, k, d in reversed(list(zip(sizes, self.kernel, self.dilation, strict=True))):
            found = [i * d * below + inner for i in range(k) for inner in found]
            below *= size
        return found


def _channels_last(x: Tensor, spatial: bool) -> Tensor:
    return (x.movedim(1, -1) if spatial else x).reshape(-1, x.shape[1 if spatial else -1])


def _each(value: Any, dims: int, fill: int) -> tuple[int, ...]:
    """One number for each dimension in space."""
    if value is None:
        return (fill,) * dims
    given = tuple(int(v) for v in value) if isinstance(value, list | tuple) else (int(value),)
    return given * dims if len(given) == 1 else given
