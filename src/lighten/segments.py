"""A graph in segments that hand on one tensor: what block-wise methods take one by one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lighten.rewrite import weight_name
from lighten.walk import is_tensor, operator

See = Callable[[fx.Node, Any], Any]


@dataclass(frozen=True)
class Segment:
    """Nodes in order; all that they need from before is the tensor of `source` (and parameters),
    all that comes after needs of them is the tensor of `target`."""

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    target: fx.Node

    def run(self, graph: fx.GraphModule, x: Tensor, see: See) -> Tensor:
        """The target's value for that of the source, with what `see` makes of each node's."""
        values: dict[fx.Node, Any] = {self.source: x}

        def value(node: fx.Node) -> Any:
            if node not in values and node.op == "get_attr":
                found: Any = graph
                for part in str(node.target).split("."):
                    found = getattr(found, part)
                values[node] = see(node, found)
            if node not in values:  # the size of the batch, asked for before
                values[node] = len(x)
            return values[node]

        for node in self.nodes:
            args = fx.node.map_arg(node.args, value)
            result = node.target(*args, **fx.node.map_arg(node.kwargs, value))  # type: ignore[operator]
            values[node] = see(node, result)
        found: Tensor = values[self.target]
        return found


def segments(
    graph: fx.GraphModule, weights: Collection[str], ends: Collection[str]
) -> list[Segment]:
    """The graph from its input to its output in the smallest segments that end at nodes in `ends`
    (or at the output) and read at least one of `weights`. What cannot be cut is one segment.

    Empty where the graph has several inputs, or no output that is one tensor.
    """
    nodes = [n for n in graph.graph.nodes if n.op != "get_attr"]
    inputs = [n for n in nodes if n.op == "placeholder"]
    outputs = [n for n in nodes if n.op == "output"]
    given = outputs[0].all_input_nodes if outputs else []
    if len(inputs) != 1 or len(given) != 1 or not is_tensor(given[0]):
        return []
    order = {n: i for i, n in enumerate(nodes)}
    last = {n: max((order[u] for u in n.users), default=-1) for n in nodes}
    found: list[Segment] = []
    source = inputs[0]
    pending: list[fx.Node] = []
    live: set[fx.Node] = {source}
    for i, node in enumerate(nodes):
        if node.op == "output":
            break
        live = {n for n in (*live, node) if last[n] > i and not _batch_size(n)}
        if node is source:
            continue
        pending.append(node)
        reads = any(weight_name(n) in weights for n in pending)
        end = node is given[0] or node.name in ends
        if live == {node} and reads and end and is_tensor(node):
            found.append(Segment(source, tuple(pending), node))
            source, pending = node, []
    if not found:
        return []
    if pending:  # a tail without weights belongs to the last
        tail = found.pop()
        found.append(Segment(tail.source, (*tail.nodes, *pending), given[0]))
    return found


def _batch_size(node: fx.Node) -> bool:
    return operator(node).startswith("sym_size") and node.args[1:] == (0,)


@torch.no_grad()
def handed_on(graph: fx.GraphModule, segment: Segment, x: Tensor, see: See, size: int) -> Tensor:
    """The target's value for all of the source's, `size` examples at a time."""
    return torch.cat([segment.run(graph, part, see) for part in torch.split(x, size)])
