"""Networks whose layers have formats of their own: which tensors are rounded, and the making of it.

A tensor between operators is rounded if any layer that it touches, as input or as output, computes
with integers; so between two float layers it stays float. A tensor that touches no layer (a sum
that a pooling reads) is rounded if all the layers nearest to it do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, fx

from lighten.errors import BadInput, WrongUse
from lighten.lockstep import Lockstep
from lighten.network import Network, batches
from lighten.quantized import Quantized
from lighten.ranges import edges_of, fit_edge, fused_into
from lighten.registry import transforms
from lighten.rewrite import editable, finished, weight_name
from lighten.rounding import solvable
from lighten.types import Spec
from lighten.walk import tensors_of

BATCH = 10


@dataclass(frozen=True)
class Touch:
    """The layers that an edge touches; nearest: it touches none, these are the next ones."""

    names: frozenset[str]
    nearest: bool = False

    def rounded(self, integers: Collection[str]) -> bool:
        """Whether the edge is, where these layers compute with integers."""
        inside = [name in integers for name in self.names]
        return bool(inside) and (all(inside) if self.nearest else any(inside))


def quantize_mixed(
    network: Network, data: Tensor, specs: Mapping[str, Spec], *, quick: bool = False
) -> Quantized:
    """Every weight in the format of its spec; those without one, or not in specs, stay float.

    data: (count, ...) of the network's input, normalised. Where a spec says activations ("a8"),
    the tensors that its layer reads and writes are rounded to so many bits; without, they stay
    float. quick: numbers chosen in a hurry, for sizes and times alone. Raises WrongUse for a
    weight that the network does not have or that cannot be quantized, BadInput without data.
    """
    if not len(data):
        raise BadInput("there is no calibration data", "pass a tensor (count, ...) of inputs")
    network = transforms["fold_batchnorm"](network, data)
    graph = editable(network)
    known = set(layers(graph))
    chosen = {name: spec for name, spec in specs.items() if spec.format is not None}
    for name in chosen:
        if name not in known:
            raise WrongUse(f"`{name}` cannot be quantized", f"what can: {', '.join(sorted(known))}")
    if quick:
        chosen = {name: replace(spec, solver="rtn") for name, spec in chosen.items()}
    bits = rounded_to(touching(graph), chosen)
    edges = {name: owner for name, owner in edges_of(graph).items() if owner in bits}
    method = "minmax" if quick else "mse"
    step = Lockstep(
        graph, chosen, edges, lambda name, seen: fit_edge(seen, bits[name], method=method),
        refit=not quick,
    )  # fmt: skip
    step.run(list(batches(data, BATCH, network.device)))
    return Quantized(finished(network, graph), step.weights, step.chosen)


def rounded_to(touched: Mapping[str, Touch], specs: Mapping[str, Spec]) -> dict[str, int]:
    """Edge -> its bits, the most that a layer at it asks for; edges that stay float left out."""
    asked = {n: int(s.activations) for n, s in specs.items() if s.format and s.activations}
    return {
        edge: max(asked[name] for name in touch.names if name in asked)
        for edge, touch in touched.items()
        if touch.rounded(asked)
    }


def layers(graph: fx.GraphModule) -> list[str]:
    """The weights that can be quantized, in the order of execution."""
    found: dict[str, bool] = {}
    for node in graph.graph.nodes:
        name = weight_name(node)
        if name is not None:
            found[name] = found.get(name, True) and solvable(node)
    return [name for name, able in found.items() if able]


def touching(graph: fx.GraphModule) -> dict[str, Touch]:
    """Edge, as edges_of names their owners -> the layers that read or write it."""
    owners = edges_of(graph)
    able = set(layers(graph))
    direct: dict[str, set[str]] = {owner: set() for owner in owners.values()}
    near: dict[str, set[str]] = {owner: set() for owner in owners.values()}
    for node in graph.graph.nodes:
        name = weight_name(node)
        written = fused_into(node) or node
        edges = {owners[n.name] for n in (*tensors_of(node), written) if n.name in owners}
        for edge in edges:
            near[edge] |= edges - {edge}
            if name in able:
                direct[edge].add(str(name))
    return {
        edge: Touch(frozenset(found or _nearest(edge, direct, near)), not found)
        for edge, found in direct.items()
    }


def _nearest(edge: str, direct: Mapping[str, set[str]], near: Mapping[str, set[str]]) -> set[str]:
    """The layers that are reached first from an edge that touches none, each way of its own."""
    seen, ring, found = {edge}, {edge}, set[str]()
    while ring:
        ring = {other for e in ring for other in near[e]} - seen
        seen |= ring
        found |= {name for e in ring for name in direct[e]}
        ring = {e for e in ring if not direct[e]}
    return found
