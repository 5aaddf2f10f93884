"""Small networks for the ONNX tests, what quantizes them, and what they must then compute.

The reference here knows nothing of lighten.simulate: it rounds after every node that has an edge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lighten.cpu import saturates
from lighten.network import Network
from lighten.quantized import Edge, Quantized
from lighten.registry import formats
from lighten.types import Compressed, Spec

EIGHT = "int7_channel_sym" if saturates() else "int8_channel_sym"
"""What 8-bit weights are stored as here: where sums of products saturate, the runtime needs 7."""


class Residual(nn.Module):
    """Convolutions (plain, depthwise with ReLU6, strided), a residual, a concat, poolings."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 16, 1, bias=False)
        self.down = nn.Conv2d(32, 24, 3, stride=2)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.point(F.relu6(self.depthwise(x)))
        x = torch.cat([F.relu(x + y), y], 1)
        x = F.max_pool2d(x, 2)
        x = F.relu(self.down(F.pad(x, (0, 1, 0, 1))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Tokens(nn.Module):
    """Linears over (batch, tokens, features), one weight used twice."""

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(features, 128)
        self.down = nn.Linear(128, features, bias=False)
        self.out = nn.Linear(features, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.relu(self.up(x)))
        x = x + self.down(F.relu(self.up(x)))
        return self.out(x.mean(1))


def network(kind: type[nn.Module] = Residual, shape: tuple[int, ...] = (2, 3, 20, 20)) -> Network:
    torch.manual_seed(0)
    module = kind()
    x = torch.randn(shape)
    return Network.of(module, x)


def compressed(net: Network, name: str, format: str) -> Compressed:
    w = net.module.state_dict()[name]
    w = w.reshape(len(w), -1)
    entry = formats[format]
    grid = entry.fit(w)
    parts = entry.pack(entry.encode(w, grid), grid)
    return Compressed(Spec(format=format), tuple(w.shape), entry, parts)  # type: ignore[arg-type]


class _Values(fx.Interpreter):
    def __init__(self, net: Network, quantized: Quantized | None) -> None:
        super().__init__(net.flexible)
        self.quantized, self.values = quantized, dict[str, Any]()

    def run_node(self, n: fx.Node) -> Any:
        q = self.quantized
        value = super().run_node(n) if q is None else self._layer(n, q)
        if q is not None and n.op == "get_attr" and str(n.target) in q.weights:
            value = q.weights[str(n.target)].dense().reshape(value.shape)
        if q is not None and n.name in q.edges:
            e = q.edges[n.name]
            codes = (value / e.scale).round().add(e.zero).clamp(e.first, e.last)
            value = (codes - e.zero) * e.scale
        self.values[n.name] = value
        return value

    def _layer(self, n: fx.Node, q: Quantized) -> Any:
        """The node's value, its bias in int32 steps where input and weight are quantized."""
        args = n.args
        source = args[0] if args else None
        while isinstance(source, fx.Node) and "flatten" in str(source.target):
            source = source.args[0]
        rounded = len(args) > 2 and isinstance(args[2], fx.Node) and args[2].op == "get_attr"
        if not rounded or str(args[1].target) not in q.weights or source.name not in q.edges:  # type: ignore[union-attr]
            return super().run_node(n)
        x, w, bias, *rest = self.fetch_args_kwargs_from_env(n)[0]
        steps = q.weights[str(args[1].target)].parts["scale"][:, 0].float()  # type: ignore[union-attr]
        steps = torch.where(steps == 0, torch.ones(()), steps) * q.edges[source.name].scale  # type: ignore[union-attr]
        bias = torch.where((bias / steps).abs() < 2**31, (bias / steps).round() * steps, bias)
        return n.target(x, w, bias, *rest)  # type: ignore[operator]


def values(net: Network, x: Tensor, quantized: Quantized | None = None) -> Mapping[str, Any]:
    """Graph node -> its value; with `quantized` as an integer runtime has it."""
    run = _Values(net, quantized)
    with torch.no_grad():
        run.values["output"] = run.run(x)
    return run.values


def quantized(
    net: Network,
    format: str = EIGHT,
    *,
    bits: int = 8,
    signed: bool = False,
    without: Iterable[str] = (),
) -> Quantized:
    """All weights in a format; edges at every tensor but those between a layer or a sum and the
    ReLU that follows it, and those that only move numbers (these take their source's)."""
    seen = values(net, net.inputs[0])
    edges: dict[str, Edge] = {}
    for node in net.graph.graph.nodes:
        value = seen.get(node.name)
        target = str(node.target)
        if node.op not in ("placeholder", "call_function") or not isinstance(value, Tensor):
            continue
        if node.name in without or "relu" in " ".join(str(u.target) for u in node.users):
            continue
        if any(part in target for part in ("pad", "max_pool", "flatten")):
            if node.args[0].name in edges and "flatten" not in target:
                edges[node.name] = edges[node.args[0].name]
            continue
        edges[node.name] = edge_of(value, bits, signed)
    weights = {layer.name: compressed(net, layer.name, format) for layer in net.layers}
    return Quantized(net, weights, edges)


def edge_of(value: Tensor, bits: int = 8, signed: bool = False) -> Edge:
    low, high = min(0.0, value.min().item()), max(0.0, value.max().item())
    scale = float(torch.tensor((high - low) / ((1 << bits) - 1)))
    first = -(1 << (bits - 1)) if signed else 0
    return Edge(scale, first + round(-low / scale), bits, signed)
