"""Which tensors of a graph can have their channels scaled together without changing its outputs.

Between the weights that write a tensor's channels and those that read them stand only operators f
with f(s x) = s f(x) for s > 0. All tensors linked so form a stream; its channels may be scaled by
any s as long as every writer multiplies by it and every reader divides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from lighten.rewrite import bias_node, groups, sole_reader, transposed, value_of, weight_name
from lighten.walk import is_tensor, operator, tensors_of

HOMOGENEOUS = {
    "relu", "leaky_relu", "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "dropout",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "clone", "contiguous", "upsample_nearest2d",
    "alias", "detach",
}  # fmt: skip


@dataclass
class Stream:
    """width: channels. tensors: in the order of execution. writers, readers: nodes with a weight.
    clips: relu6 and the like among the tensors: node -> its upper bound."""

    width: int
    tensors: list[fx.Node] = field(default_factory=list)
    writers: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)
    clips: dict[fx.Node, float] = field(default_factory=dict)


def streams(graph: fx.GraphModule) -> list[Stream]:
    """Every stream of a graph whose writers and readers are all known weights."""
    parent: dict[fx.Node, fx.Node] = {}
    locked: set[fx.Node] = set()
    writers: dict[fx.Node, list[fx.Node]] = {}
    readers: dict[fx.Node, list[fx.Node]] = {}
    clips: dict[fx.Node, float] = {}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for node in graph.graph.nodes:
        if node.op == "get_attr":
            continue
        sources = [n for n in tensors_of(node) if n in parent]
        if is_tensor(node):
            parent[node] = node
        if weight_name(node) is not None and _free(graph, node) and len(sources) == 1:
            writers[node] = [node]
            readers.setdefault(sources[0], []).append(node)
        elif is_tensor(node) and _linked(node, sources):
            for source in sources:
                parent[root(source)] = root(node)
            bound = _bound(node)
            if bound is not None:
                clips[node] = bound
        else:
            locked.update(sources)
            locked.update([node] if node in parent else [])
    found: dict[fx.Node, Stream] = {}
    barred = {root(n) for n in locked}
    for node in parent:
        at = root(node)
        if at in barred:
            continue
        stream = found.setdefault(at, Stream(node.meta["val"].shape[1]))
        stream.tensors.append(node)
        stream.writers += writers.get(node, [])
        stream.readers += readers.get(node, [])
        if node in clips:
            stream.clips[node] = clips[node]
    return [s for s in found.values() if s.writers and s.readers]


def _free(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a weight and its bias can be given other values."""
    bias = bias_node(node)
    owned = bias is None or (value_of(graph, bias) is not None and len(bias.users) == 1)  # type: ignore[attr-defined]
    plane = operator(node) != "linear" or node.meta["val"].ndim == 2
    return owned and plane and sole_reader(graph, node)


def _linked(node: fx.Node, sources: list[fx.Node]) -> bool:
    """Whether scaling all sources' channels scales this node's alike."""
    if not sources or node.meta["val"].ndim < 2:
        return False
    shape = node.meta["val"].shape
    if any(s.meta["val"].ndim < 2 or s.meta["val"].shape[1] != shape[1] for s in sources):
        return False
    name = operator(node)
    if name == "add":
        return (
            len(sources) == 2 and not node.kwargs
            and sources[0].meta["val"].shape[1:] == sources[1].meta["val"].shape[1:]
        )  # fmt: skip
    if name == "pad":
        constant = len(node.args) < 3 or node.args[2] == "constant"
        planes = len(node.args[1]) <= 2 * (len(shape) - 2)  # type: ignore[arg-type]
        return planes and not (constant and len(node.args) > 3 and node.args[3])
    if name == "mean":
        dims = node.args[1] if len(node.args) > 1 else None
        return isinstance(dims, list | tuple) and all(
            d % len(sources[0].meta["val"].shape) > 1 for d in dims
        )
    if name in ("view", "reshape", "flatten", "squeeze"):
        before = sources[0].meta["val"].shape
        return all(int(n) == 1 for n in before[2:]) and len(shape) == 2
    return name in HOMOGENEOUS or _bound(node) is not None


def _bound(node: fx.Node) -> float | None:
    """The upper bound of an activation that clips to [0, bound]."""
    name = operator(node)
    if name == "relu6":
        return 6.0
    if name in ("hardtanh", "clamp") and len(node.args) == 3:
        low, high = node.args[1], node.args[2]
        if isinstance(low, int | float) and isinstance(high, int | float) and low == 0 < high:
            return float(high)
    return None


def depthwise(node: fx.Node) -> bool:
    """Whether each output channel of a convolution reads one input channel of its own."""
    g = groups(node)
    shape = node.args[1].meta["val"].shape  # type: ignore[union-attr]
    return g > 1 and shape[1] == 1 and shape[0] == g and not transposed(node)
