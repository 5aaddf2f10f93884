"""Which tensors of a graph are quantized, and with which scale.

A tensor that an integer operator reads or writes is an edge. An operator followed by one activation
that only clips is quantized after it (the clip then costs nothing), and operators that only move
data have the edge of their input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from lighten.errors import BadInput
from lighten.quantized import Edge
from lighten.rewrite import weight_name
from lighten.walk import is_tensor, operator, tensors_of

CLIPS = {"relu", "relu6", "hardtanh", "clamp", "clamp_min"}
"""Activations that a quantizer's own range can do."""

MOVES = {
    "max_pool1d", "max_pool2d", "max_pool3d", "view", "reshape", "flatten", "unflatten", "permute",
    "transpose", "squeeze", "unsqueeze", "slice", "select", "expand", "clone", "contiguous",
    "detach", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "chunk", "split",
    "split_with_sizes", "getitem", "dropout", "alias", "t", "numpy_T", "repeat", "unbind", "narrow",
}  # fmt: skip
"""Operators whose outputs are some of their input's numbers."""

INTEGER = {
    "add", "mul", "sub", "cat", "mean", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "sigmoid", "silu",
    "hardswish", "hardsigmoid", "leaky_relu", "tanh", "matmul", "bmm", "upsample_nearest2d",
    "upsample_bilinear2d",
}  # fmt: skip
"""Operators besides convolution and linear that runtimes compute on 8-bit numbers."""


def moves(node: fx.Node) -> bool:
    """Whether a node only moves its input's numbers; zeros may be added."""
    name = operator(node)
    if name == "pad":
        mode = node.args[2] if len(node.args) > 2 else "constant"
        value = node.args[3] if len(node.args) > 3 else 0
        return mode != "constant" or not value
    return name in MOVES


def integer(node: fx.Node) -> bool:
    """Whether runtimes have this operator on 8-bit inputs and outputs."""
    return weight_name(node) is not None or operator(node) in INTEGER


def fused_into(node: fx.Node) -> fx.Node | None:
    """The clipping activation that is an operator's only reader, or None."""
    if not integer(node) or len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    return reader if operator(reader) in CLIPS and reader.args[0] is node else None


def edges_of(graph: fx.GraphModule, outputs: bool = False) -> dict[str, str]:
    """Edge -> the edge whose quantizer it has: its own name, or that of the tensor it moves.

    outputs: quantize what the graph gives too (else it stays float where nothing else reads it).
    """
    found: dict[str, str] = {}
    for node in graph.graph.nodes:
        if not is_tensor(node) or node.op == "get_attr" or fused_into(node) is not None:
            continue
        if not outputs and all(user.op == "output" for user in node.users):
            continue
        source = tensors_of(node)
        if moves(node) and source:
            root = _root(source[0])
            if root.name in found:
                found[node.name] = found[root.name]
            continue
        if _written_by_integers(node) or any(_reads(user) for user in node.users):
            found[node.name] = node.name
    return found


def _root(node: fx.Node) -> fx.Node:
    """The tensor that a node's numbers come from, through splits and the like."""
    while moves(node) and not is_tensor(node):
        node = tensors_of(node)[0]
    return node


def _written_by_integers(node: fx.Node) -> bool:
    return integer(node) or (
        operator(node) in CLIPS and any(fused_into(source) is node for source in tensors_of(node))
    )


def _reads(node: fx.Node) -> bool:
    """Whether a node, or one that it hands its numbers to, computes with integers."""
    return integer(node) or (moves(node) and any(_reads(user) for user in node.users))


# -- the quantizer of one tensor -------------------------------------------------------------------
@dataclass
class Histogram:
    """How often a tensor took which value: memory does not grow with the data.

    counts: (bins,) between low and high; the range grows by whole doublings of the bin width.
    """

    bins: int = 4096
    low: float = 0.0
    high: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def span(self, low: float, high: float) -> None:
        """Count from low to high, where the range is known before."""
        self.low, self.high = min(low, 0.0), max(high, 0.0)
        self.counts = torch.zeros(self.bins, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Count values; raises BadInput where they are not finite."""
        least, greatest = (float(t) for t in values.detach().aminmax())
        if not (abs(least) < float("inf") and abs(greatest) < float("inf")):
            raise BadInput(
                "an activation holds NaN or infinite values on the calibration data",
                "is the data normalised as the network was trained?",
            )
        least, greatest = min(least, 0.0), max(greatest, 0.0)
        if self.counts.numel() == 0:
            self.low, self.high = least, greatest
            self.counts = torch.zeros(self.bins, dtype=torch.float64)
        elif least < self.low or greatest > self.high:
            self._widen(min(least, self.low), max(greatest, self.high))
        if self.high > self.low:
            counted = torch.histc(values.detach().float(), self.bins, self.low, self.high)
            self.counts += counted.double().cpu()
        else:
            self.counts[0] += values.numel()

    def _widen(self, low: float, high: float) -> None:
        """Spread the old counts over the bins of the new range."""
        old, centres = self.counts, self.centres()
        self.low, self.high = low, high
        width = (high - low) / self.bins
        at = ((centres - low) / width).long().clamp_(0, self.bins - 1)
        self.counts = torch.zeros_like(old).index_add_(0, at, old)

    def centres(self) -> Tensor:
        """(bins,): the middle of each bin."""
        width = (self.high - self.low) / self.bins
        return self.low + width * (torch.arange(self.bins, dtype=torch.float64) + 0.5)


METHODS = ("minmax", "percentile", "mse")


def fit_edge(
    seen: Histogram, bits: int = 8, *, symmetric: bool = False, signed: bool = False,
    method: str = "mse", percentile: float = 99.99,
) -> Edge:  # fmt: skip
    """The quantizer for values seen so: their whole range, the range without the outermost
    100 - percentile percent, or the range with the least mean squared error.

    Zero is always represented exactly. symmetric: the zero point lies in the middle.
    """
    low, high = seen.low, seen.high
    if method == "percentile":
        low, high = _percentile(seen, percentile)
    if method != "mse" or high <= low:
        return edge_of(low, high, bits, symmetric, signed)
    weights, x = seen.counts, seen.centres()
    kept = weights > 0
    weights, x = weights[kept], x[kept]
    best, least = edge_of(low, high, bits, symmetric, signed), float("inf")
    shares = torch.arange(1, 0, -0.02).tolist()
    for _ in range(2):  # the low end, the high end, and once more
        for end in (seen.low, seen.high):
            for share in shares:
                a, b = (end * share, high) if end is seen.low else (low, end * share)
                edge = edge_of(a, b, bits, symmetric, signed)
                error = float((weights * (quantize_values(x, edge) - x) ** 2).sum())
                if error < least:
                    best, least, (low, high) = edge, error, (a, b)
    return best


def edge_of(low: float, high: float, bits: int, symmetric: bool, signed: bool) -> Edge:
    """The quantizer that spans [low, high], 0 in it."""
    low, high = min(low, 0.0), max(high, 0.0)
    first = -(1 << (bits - 1)) if signed else 0
    if symmetric:
        top = (1 << (bits - 1)) - 1
        zero = first + (1 << (bits - 1))
        scale = max(high, -low) / top
        return Edge(_float32(scale) or 1.0, zero, bits, signed)
    levels = (1 << bits) - 1
    scale = (high - low) / levels
    if scale == 0:
        return Edge(1.0, first, bits, signed)
    zero = first + min(max(round(-low / scale), 0), levels)
    # a range that begins or ends at 0 must not reach beyond its other end: a clip there would not
    # vanish in the runtime
    return Edge(_float32(scale, down=low == 0 or high == 0), zero, bits, signed)


def _float32(value: float, down: bool = False) -> float:
    """The nearest single-precision number, or the nearest not above."""
    near = torch.tensor(value, dtype=torch.float32)
    if down and float(near) > value:
        near = torch.nextafter(near, torch.tensor(0.0))
    return float(near)


def _percentile(seen: Histogram, percentile: float) -> tuple[float, float]:
    total = seen.counts.cumsum(0) / seen.counts.sum()
    tail = (1 - percentile / 100) / (2 if seen.low < 0 < seen.high else 1)
    x = seen.centres()
    low = seen.low if seen.low == 0 else float(x[int((total < tail).sum())])
    last = min(int((total < 1 - tail).sum()), seen.bins - 1)
    return min(low, 0.0), max(0.0 if seen.high == 0 else float(x[last]), 0.0)


def quantize_values(x: Tensor, edge: Edge) -> Tensor:
    """The numbers that are left of x when an edge has rounded it."""
    code = torch.clamp(torch.round(x / edge.scale) + edge.zero, edge.first, edge.last)
    return (code - edge.zero) * edge.scale


def fit_edges(
    edges: Mapping[str, str], seen: Mapping[str, Histogram], bits: int = 8, *,
    symmetric: bool = False, signed: bool = False, method: str = "mse",
) -> dict[str, Edge]:  # fmt: skip
    """A quantizer for every edge; edges that share one get the same."""
    own = {
        owner: fit_edge(seen[owner], bits, symmetric=symmetric, signed=signed, method=method)
        for owner in dict.fromkeys(edges.values())
    }
    return {name: own[owner] for name, owner in edges.items()}


def observe(
    graph: fx.GraphModule, wanted: Iterable[str], batches: Iterable[Tensor]
) -> dict[str, Histogram]:
    """Histograms of the wanted nodes over batches of the graph's first input."""
    from lighten.walk import walk

    seen = {name: Histogram() for name in wanted}

    def see(node: fx.Node, value: object) -> object:
        if node.name in seen and isinstance(value, Tensor):
            seen[node.name].add(value)
        return value

    for batch in batches:
        walk(graph, (batch,), see)
    return seen
