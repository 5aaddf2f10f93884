"""A trainable twin of a quantized network: it computes what lighten.simulate does, with gradients.

    twin = trainable(quantized, "all")
    ... train it as any module ...
    quantized = twin.freeze()

Rounding lets gradients through where it does not clip, and steps are learned as in LSQ: of
x̂ = s (clip(round(x / s) + z) - z) the gradient to s is round(x / s) - x / s inside and the clipped
code outside, times 1 / sqrt(count * last code).

One rate suits all parameters, since each is a number without unit that begins at 0: a step is
s exp(p), a code c + 8 p, a bias b + p * (size of its channel's output). With weight decay they are
drawn to the network that was given. Batch norms are folded already, so what is trained is what is
stored: no batch statistics have to be folded into a quantized weight afterwards. That is the usual
end of quantization-aware training (statistics frozen, Krishnamoorthi 2018, section 3.2.2) and
enough for a network that begins from its trained self.

*Source:* Esser et al. 2020, "Learned Step Size Quantization", equations 3 to 5; Bengio et al. 2013,
"Estimating or Propagating Gradients Through Stochastic Neurons" (straight through).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from lighten.errors import WrongUse
from lighten.learned_grids import EdgeGrid, WeightGrid, straight
from lighten.quantized import Quantized
from lighten.ranges import moves
from lighten.rewrite import bias_node, set_parameter, weight_name
from lighten.simulate import round_bias
from lighten.walk import operator, tensors_of

MODES = ("scales", "all")


def trainable(quantized: Quantized, mode: str = "all", *, zeros: bool = False) -> Trainable:
    """A module that computes what `quantized` does and can learn.

    mode "scales": codes stay as they are; steps of weights and edges, and biases, are learned.
    "all": codes and parameters that are still float, too (quantization-aware training). zeros:
    learn zero points of edges that have numbers on both sides of 0.
    Raises WrongUse for weights that are no integers with a scale.
    """
    if mode not in MODES:
        raise WrongUse(f"there is no mode `{mode}`", f"one of {', '.join(MODES)}")
    return Trainable(quantized, mode == "all", zeros)


class Trainable(nn.Module):
    """See trainable. Its state dict is of its own parameters and the float ones of the graph."""

    def __init__(self, quantized: Quantized, codes: bool, zeros: bool) -> None:
        super().__init__()
        self.quantized = quantized
        self.graph_module = _own(quantized.network.flexible)
        self.names: dict[str, str] = {}  # of a parameter or an edge -> where it is learned
        self.weights = nn.ModuleDict()
        self.edges = nn.ModuleDict()
        self.floats = nn.ParameterDict()
        self._edges()
        self._weights(codes)
        self._floats(codes)
        for key in self.edges:
            edge = self._edge(key)
            edge.zero.requires_grad_(zeros and edge.two_sided)

    def _edge(self, key: str) -> EdgeGrid:
        return cast(EdgeGrid, self.edges[key])

    def _weight(self, name: str) -> WeightGrid:
        return cast(WeightGrid, self.weights[self.names[name]])

    # -- what is learned -----------------------------------------------------------------------
    def _edges(self) -> None:
        edges = self.quantized.edges
        for node in self.graph_module.graph.nodes:
            edge = edges.get(node.name)
            if edge is None:
                continue
            source = tensors_of(node)[0].name if moves(node) and tensors_of(node) else ""
            if source in self.names and edges[source] == edge:  # the same numbers, moved
                self.names[node.name] = self.names[source]
                continue
            key = self.names[node.name] = f"e{len(self.edges)}"
            self.edges[key] = EdgeGrid(edge, *_bounds(node))

    def _weights(self, codes: bool) -> None:
        state = dict(self.graph_module.named_parameters())
        for name, weight in self.quantized.weights.items():
            key = self.names[name] = f"w{len(self.weights)}"
            self.weights[key] = WeightGrid(name, weight, state[name] if codes else None)

    def _floats(self, every: bool) -> None:
        """Biases with the size of their channels' outputs; every: all other parameters, too."""
        state = dict(self.graph_module.named_parameters())
        self.grids: dict[str, tuple[str, str]] = {}  # bias -> its weight, its input's edge
        units: dict[str, Tensor] = {}
        for node in self.graph_module.graph.nodes:
            bias, weight = bias_node(node), weight_name(node)
            if weight is None or not isinstance(bias, fx.Node) or bias.op != "get_attr":
                continue
            name = str(bias.target)
            norm = state[weight].flatten(1).norm(dim=1) if len(state[weight]) else state[weight]
            same = norm.shape == state[name].shape  # else a transposed convolution
            units[name] = norm if same else norm.mean().expand_as(state[name])
            source = tensors_of(node)[0].name if tensors_of(node) else ""
            if weight in self.quantized.weights and source in self.names:
                self.grids[name] = (weight, source)
        if every:
            nodes = self.graph_module.graph.nodes
            read = dict.fromkeys(str(n.target) for n in nodes if n.op == "get_attr" and n.users)
            rest = [n for n in read if n in state and n not in self.names and n not in units]
            rest = [n for n in rest if state[n].is_floating_point()]
            units |= {n: state[n].square().mean().sqrt().expand_as(state[n]) for n in rest}
        for name, unit in units.items():
            key = self.names[name] = f"f{len(self.floats)}"
            self.register_buffer(f"unit_{key}", unit.clone(), persistent=False)
            self.floats[key] = nn.Parameter(torch.zeros_like(unit))

    def learned_in(self, nodes: Iterable[fx.Node]) -> list[nn.Parameter]:
        """The parameters that what these nodes compute depends on."""
        found: dict[nn.Parameter, None] = {}
        for node in nodes:
            parts = [self.edges[self.names[node.name]]] if node.name in self.names else []
            for name in (str(n.target) for n in node.all_input_nodes if n.op == "get_attr"):
                key = self.names.get(name, "")
                if key in self.weights:
                    parts.append(self.weights[key])
                elif key in self.floats:
                    found[self.floats[key]] = None
            for part in parts:
                found |= dict.fromkeys(p for p in part.parameters() if p.requires_grad)
        return list(found)

    # -- what is computed ----------------------------------------------------------------------
    def forward(self, *inputs: Tensor) -> Any:
        return _Run(self).run(*inputs)

    def seen(self, node: fx.Node, value: Any) -> Any:
        """What readers of a node get in place of its value in the float graph."""
        if node.op == "get_attr":
            return self.parameter(str(node.target), value)
        key = self.names.get(node.name)
        return self.edges[key](value) if key is not None and key in self.edges else value

    def parameter(self, name: str, value: Any) -> Any:
        """A parameter as the runtime has it, of the shape of `value`."""
        key = self.names.get(name)
        if key is None:
            return value
        if key in self.weights:
            dense: Tensor = self.weights[key]()
            return dense.reshape(value.shape).to(value)
        found = value + self.floats[key] * getattr(self, f"unit_{key}")
        if name not in self.grids:
            return found
        weight, source = self.grids[name]
        with torch.no_grad():
            scale = self._weight(weight).scales()[:, 0]
            steps = scale * self._edge(self.names[source]).steps()
        return straight(found, round_bias(found, steps))

    @torch.no_grad()
    def freeze(self) -> Quantized:
        """The quantized network as it is now: its simulation computes what this module does."""
        before = self.quantized
        weights = {name: self._weight(name).compressed() for name in before.weights}
        owned = {key: self._edge(key).edge() for key in self.edges}
        edges = {name: owned[self.names[name]] for name in before.edges if name in self.names}
        module = _own(before.network.module)
        state = dict(module.named_parameters())
        for name in [n for n, key in self.names.items() if key in self.floats]:
            old = state[name]
            key = self.names[name]
            unit = getattr(self, f"unit_{key}")
            set_parameter(module, name, old + (self.floats[key] * unit).to(old))
        return replace(
            before, network=before.network.with_module(module), weights=weights, edges=edges
        )


class _Run(fx.Interpreter):
    def __init__(self, twin: Trainable) -> None:
        super().__init__(twin.graph_module)
        self.twin = twin

    def run_node(self, n: fx.Node) -> Any:
        return self.twin.seen(n, super().run_node(n))


def _own(module: nn.Module) -> Any:
    """A copy whose tensors are its own; of a graph, a plain module, which can be trained."""
    if not isinstance(module, fx.GraphModule):
        return copy.deepcopy(module)
    plain = fx.GraphModule(module, module.graph)
    for name, value in list(plain.named_parameters()):
        set_parameter(plain, name, value.detach().clone())
    return plain.train(module.training)


def _bounds(node: fx.Node) -> tuple[float | None, float | None]:
    """Least and greatest number of a node that clips at both ends: its edge may not reach beyond
    them, or the runtime could not leave the clip to the edge."""
    name, args = operator(node), node.args[1:]
    if name == "relu6":
        return 0.0, 6.0
    if name in ("hardtanh", "clamp"):
        low, high = (*args, None, None)[:2] if args or name == "clamp" else (-1.0, 1.0)
        ends = [float(e) if isinstance(e, int | float) else None for e in (low, high)]
        return ends[0], ends[1]
    return None, None
