"""Quantize a graph node by node, the float network running beside it on the same images.

When a weight is reached, everything before it is already quantized: its inputs are those that the
runtime will give it, and its target is what the float network has at this place. So an error made
early is seen, and partly undone, by every weight after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lighten.errors import WrongUse
from lighten.network import LINEAR
from lighten.quantized import Edge
from lighten.ranges import Histogram, quantize_values
from lighten.rewrite import bias_node, groups, set_bias, value_of, weight_name
from lighten.rounding import Moments, columns, fitted, grouped, moments, rounded, solvable
from lighten.simulate import bias_steps, round_bias
from lighten.types import Compressed, Spec
from lighten.walk import is_tensor, operator, tensors_of

_FOLDS = 4
Values = dict[fx.Node, list[Any]]


@dataclass
class Lockstep:
    """What is to be quantized, and how.

    specs: parameter's name -> format and solver. edges: as ranges.edges_of gives it; those that
    stay float left out. fit: histogram and edge's name -> quantizer. refit: move weights towards
    the float network's outputs before they are rounded; correct: set biases so that the mean of
    every output is the float network's.
    """

    graph: fx.GraphModule
    specs: Mapping[str, Spec]
    edges: Mapping[str, str]
    fit: Callable[[str, Histogram], Edge]
    refit: bool = True
    correct: bool = True
    weights: dict[str, Compressed] = field(default_factory=dict)
    chosen: dict[str, Edge] = field(default_factory=dict)

    @torch.no_grad()
    def run(self, batches: Sequence[Tensor]) -> None:
        """Fill `weights` and `chosen`, and put the corrected biases into the graph."""
        nodes = list(self.graph.graph.nodes)
        if sum(n.op == "placeholder" for n in nodes) != 1:
            raise WrongUse(
                "networks with several inputs cannot be quantized with calibration data yet",
                "wrap the network in a module that takes one tensor",
            )
        last = {n: reader for reader in nodes for n in reader.all_input_nodes}
        dense: Values = {}
        quant: Values = {}
        for node in nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                dense[node] = list(batches)
                quant[node] = self._rounded(node, list(batches))
            elif node.op == "get_attr":
                value = _attribute(self.graph, node)
                dense[node] = quant[node] = [value] * len(batches)
            else:
                dense[node] = _computed(node, dense, len(batches))
                if weight_name(node) in self.specs:
                    quant[node] = self._weighted(node, dense, quant)
                else:
                    quant[node] = _computed(node, quant, len(batches))
                quant[node] = self._rounded(node, quant[node])
            for source in node.all_input_nodes:
                if last.get(source) is node:  # a bias that was added just now has no values
                    del dense[source], quant[source]
            if node not in last:
                del dense[node], quant[node]

    def _rounded(self, node: fx.Node, values: list[Any]) -> list[Any]:
        """A node's values as its edge has them; the edge is chosen where it is a new one."""
        owner = self.edges.get(node.name)
        if owner is None:
            return values
        if owner == node.name:
            seen = Histogram()
            low, high = zip(*((float(v.min()), float(v.max())) for v in values), strict=True)
            seen.span(min(low), max(high))
            for value in values:
                seen.add(value)
            self.chosen[owner] = self.fit(owner, seen)
        edge = self.chosen[node.name] = self.chosen[owner]
        return [quantize_values(v, edge) for v in values]

    def _weighted(self, node: fx.Node, dense: Values, quant: Values) -> list[Tensor]:
        """Round a node's weight and bias; its outputs on the quantized inputs."""
        name = str(weight_name(node))
        weight = value_of(self.graph, node.args[1])
        bias = value_of(self.graph, bias_node(node))
        if weight is None or not solvable(node):
            raise WrongUse(
                f"`{name}` is the weight of {operator(node)}, which cannot be quantized yet",
                "leave it float: keep_float",
            )
        spec, source = self.specs[name], tensors_of(node)[0]
        g = groups(node)
        as_groups = weight.reshape(g, weight.shape[0] // g, -1)
        folds = self._moments(node, weight.shape[2:], dense, quant)
        whole = folds[0]
        for fold in folds[1:]:
            whole = whole + fold
        if name not in self.weights:  # a weight read twice is rounded for its first reader
            aim = fitted(folds, as_groups) if self.refit else as_groups
            kept = as_groups != 0  # what was pruned stays pruned
            self.weights[name] = rounded(whole, aim, spec, None if bool(kept.all()) else kept)
        code = self.weights[name]
        q = code.dense().view_as(as_groups)
        if self.correct and (bias is None or _owns(bias_node(node))):
            x, t, _, _ = whole.centred()
            bias = (t - (q @ x.unsqueeze(2)).squeeze(2)).flatten()
            set_bias(self.graph, node, bias)
            edge = self.chosen.get(source.name)
            if edge is not None:
                bias = round_bias(bias, bias_steps(edge, code))
        replaced = {1: q.view_as(weight), 2: bias}
        return _computed(node, quant, len(quant[source]), replaced)

    def _moments(
        self, node: fx.Node, kernel: Sequence[int], dense: Values, quant: Values
    ) -> list[Moments]:
        """Sums over the images, in folds; the target includes what the sum after it has lost."""
        other = _skip(node)
        source = tensors_of(node)[0]
        folds: list[Moments | None] = [None] * min(_FOLDS, len(quant[source]))
        for i, x in enumerate(quant[source]):
            target = dense[node][i]
            if other is not None and other in quant:
                target = target + (dense[other][i] - quant[other][i])
            for piece, aim in zip(x.split(2), target.split(2), strict=True):
                new = moments(columns(node, piece, kernel), _as_columns(node, aim))
                old = folds[i % len(folds)]
                folds[i % len(folds)] = new if old is None else old + new
        return [fold for fold in folds if fold is not None]


def _attribute(graph: fx.GraphModule, node: fx.Node) -> Any:
    found: Any = graph
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


def _computed(
    node: fx.Node, values: Values, count: int, replaced: Mapping[int, Any] | None = None
) -> list[Any]:
    """A node's value for each batch; replaced: position -> another argument."""
    found = []
    for i in range(count):

        def value(source: fx.Node, i: int = i) -> Any:
            return values[source][i] if source in values else None

        args: list[Any] = list(fx.node.map_arg(node.args, value))
        for at, other in (replaced or {}).items():
            args += [None] * (at + 1 - len(args))
            args[at] = other
        found.append(node.target(*args, **fx.node.map_arg(node.kwargs, value)))  # type: ignore[operator]
    return found


def _as_columns(node: fx.Node, y: Tensor) -> Tensor:
    """A node's output as (groups, out / groups, positions)."""
    if node.target in LINEAR:
        return y.reshape(-1, y.shape[-1]).T.unsqueeze(0)
    g = groups(node)
    return grouped(y.flatten(2), g)


def _owns(bias: object) -> bool:
    return isinstance(bias, fx.Node) and bias.op == "get_attr" and len(bias.users) == 1


def _skip(node: fx.Node) -> fx.Node | None:
    """The other summand where a node is read only by a sum of two tensors of one shape."""
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    if operator(reader) != "add" or reader.kwargs or len(reader.args) != 2:
        return None
    others = [n for n in tensors_of(reader) if n is not node]
    if len(others) != 1 or not is_tensor(others[0]):
        return None
    same = others[0].meta["val"].shape == node.meta["val"].shape
    return others[0] if same else None
