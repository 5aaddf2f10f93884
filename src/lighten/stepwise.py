"""Run a network's graph node by node over many batches, keeping only what is still to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lighten.errors import BadInput, WrongUse
from lighten.network import Network
from lighten.rewrite import editable

Values = dict[fx.Node, list[Any]]
"""A node's value for each batch."""


class Steps:
    """A graph and, for each node, after which node its value is of no more use.

    parameters: values that stand in for the graph's own, by state-dict name.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.nodes = [n for n in graph.graph.nodes if n.op != "output"]
        self.order = {n: i for i, n in enumerate(self.nodes)}
        self.last = {source: n for n in self.nodes for source in n.all_input_nodes}
        self.kept = {n for o in graph.graph.nodes if o.op == "output" for n in o.all_input_nodes}
        self.parameters: dict[str, Tensor] = {}
        readers: dict[int, set[fx.Node]] = {}
        for n in self.nodes:
            if n.op == "get_attr":
                readers.setdefault(id(self.stored(n)), set()).update(n.users)
        self._readers = readers

    @property
    def output(self) -> fx.Node:
        """The first tensor that the network gives."""
        for node in self.graph.graph.nodes:
            if node.op == "output":
                for source in node.all_input_nodes:
                    first: fx.Node = source
                    return first
        raise BadInput("the network's graph gives no tensor", "return what it computes")

    def stored(self, node: fx.Node) -> Any:
        """The tensor behind a get_attr node."""
        found: Any = self.graph
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return found

    def readers(self, node: fx.Node) -> set[fx.Node]:
        """All nodes that read the tensor behind a get_attr node, under any name."""
        return self._readers[id(self.stored(node))]

    def tensor(self, node: fx.Node, changed: Mapping[str, Tensor] | None = None) -> Any:
        """A get_attr node's value, with the values that stand in."""
        name = str(node.target)
        if changed and name in changed:
            return changed[name]
        return self.parameters[name] if name in self.parameters else self.stored(node)

    def compute(
        self, node: fx.Node, values: Values, count: int, changed: Mapping[str, Tensor] | None = None
    ) -> list[Any]:
        """A node's value for each of `count` batches."""
        if node.op == "get_attr":
            return [self.tensor(node, changed)] * count
        found = []
        for i in range(count):
            args = fx.node.map_arg(node.args, lambda n, i=i: values[n][i])  # type: ignore[misc]
            kwargs = fx.node.map_arg(node.kwargs, lambda n, i=i: values[n][i])  # type: ignore[misc]
            found.append(node.target(*args, **kwargs))  # type: ignore[operator]
        return found

    def forget(self, node: fx.Node, values: Values) -> None:
        """Drop what no node after this one reads."""
        for source in {node, *node.all_input_nodes} - self.kept:
            done = source not in self.last or self.order[self.last[source]] <= self.order[node]
            if done:
                values.pop(source, None)

    def whole(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """The network's first output for each batch."""
        found: list[Tensor] = []
        for x in batches:
            values: Values = {}
            for node in self.nodes:
                values[node] = [x] if node.op == "placeholder" else self.compute(node, values, 1)
                self.forget(node, values)
            found.append(values[self.output][0])
        return found

    def rest(
        self, start: fx.Node, values: Values, count: int, changed: Mapping[str, Tensor],
        added: Mapping[fx.Node, Tensor],
    ) -> list[Any]:  # fmt: skip
        """The network's first output for each batch, run from `start` on with changed parameters.

        values: of all nodes before `start` that are still to be read; not changed. added: to the
        outputs of these nodes, broadcast.
        """
        own: Values = dict(values)
        for n in self.nodes:
            if n.op == "get_attr":
                own[n] = [self.tensor(n, changed)] * count
        for n in self.nodes[self.order[start] :]:
            if n.op != "get_attr":
                own[n] = self.compute(n, own, count)
                if n in added:
                    own[n] = [y + added[n] for y in own[n]]
                self.forget(n, own)
        return own[self.output]


def steps_of(network: Network, data: Tensor, batch: int) -> tuple[Steps, list[Tensor]]:
    """The network's graph without operators that work in place, and data in batches for it.

    Where the graph works for one batch size only, batches have that size and a rest is left out.
    Raises WrongUse for a network of several inputs and for too little data.
    """
    if len(network.inputs) != 1:
        raise WrongUse(
            f"{network.source} takes {len(network.inputs)} inputs; calibration knows one",
            "wrap it in a module that takes one tensor",
        )
    data = data.to(network.device)
    try:
        graph = editable(network)
    except BadInput:
        graph, batch = network.graph, len(network.inputs[0])
        batches = [b for b in torch.split(data, batch) if len(b) == batch]
    else:
        batches = list(torch.split(data, batch))
    if not batches:
        raise WrongUse(f"{len(data)} examples are no whole batch of {batch}", "give more examples")
    return Steps(graph), batches


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """Mean KL divergence in nats: classes along dimension 1 of maps (n, c, ...), else the last."""
    dim = 1 if before.ndim > 3 else -1
    p, q = before.float().log_softmax(dim), after.float().log_softmax(dim)
    return torch.clamp((p.exp() * (p - q)).sum(dim).mean(), min=0)
