"""What a weight's outputs go through before they count: a batch norm, a sum, an activation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lighten.stepwise import Steps, Values
from lighten.walk import is_tensor, operator

aten = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """A batch norm with fixed statistics: the get_attr nodes of its tensors."""

    weight: fx.Node
    bias: fx.Node
    mean: fx.Node
    variance: fx.Node
    epsilon: float

    def spread(self, steps: Steps) -> Tensor:
        """Its running standard deviation."""
        variance: Tensor = steps.tensor(self.variance)
        return (variance + self.epsilon).sqrt()


@dataclass(frozen=True)
class Tail:
    """nodes: the batch norm and the sum after a weight, in order, where they are. other: the sum's
    other summand. low, high: where the activation after them cuts its input off."""

    nodes: tuple[fx.Node, ...] = ()
    norm: Norm | None = None
    other: fx.Node | None = None
    low: float = -math.inf
    high: float = math.inf


def tail_of(steps: Steps, node: fx.Node, values: Values) -> Tail:
    """What follows a weight's node. A summand that `values` does not have yet is not looked at."""
    nodes, norm, other, end = [], None, None, node
    reader = _only(steps, end)
    if reader is not None and operator(reader) == "batch_norm":
        norm = _norm(steps, reader)
        if norm is None:
            return Tail()
        nodes.append(reader)
        end = reader
        reader = _only(steps, end)
    if reader is not None and operator(reader) == "add":
        other = _other(reader, end)
        if other is None or other not in values:
            return Tail(tuple(nodes), norm)
        nodes.append(reader)
        end = reader
        reader = _only(steps, end)
    low, high = _cut(reader)
    return Tail(tuple(nodes), norm, other, low, high)


def _only(steps: Steps, node: fx.Node) -> fx.Node | None:
    """The node's only reader."""
    return next(iter(node.users)) if len(node.users) == 1 and node not in steps.kept else None


def _norm(steps: Steps, node: fx.Node) -> Norm | None:
    tensors = node.args[1:5]
    if bool(node.args[5]) or not all(isinstance(t, fx.Node) for t in tensors):
        return None
    if any(steps.readers(t) != {node} for t in tensors if isinstance(t, fx.Node)):
        return None
    return Norm(*tensors, float(node.args[7]))  # type: ignore[call-arg,arg-type]


def _other(node: fx.Node, end: fx.Node) -> fx.Node | None:
    """The other summand of a sum of two tensors of one shape."""
    if node.kwargs or len(node.args) != 2:
        return None
    others = [a for a in node.args if a is not end]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or not is_tensor(others[0]):
        return None
    return others[0] if others[0].meta["val"].shape == end.meta["val"].shape else None


def _cut(reader: fx.Node | None) -> tuple[float, float]:
    if reader is None:
        return -math.inf, math.inf
    name = operator(reader)
    if name == "relu":
        return 0.0, math.inf
    if name in ("relu6", "hardtanh", "clamp"):
        bounds = [*reader.args[1:], None, None] if name != "relu6" else [0.0, 6.0]
        if name == "hardtanh":
            bounds = [*reader.args[1:], -1.0, 1.0][:2] if len(reader.args) < 2 else bounds
        low, high = (
            b if isinstance(b, int | float) else d
            for b, d in zip(bounds[:2], (-math.inf, math.inf), strict=True)
        )
        return float(low), float(high)
    return -math.inf, math.inf
