"""What widths and formats of layers cost together, in bytes and in milliseconds.

An option of a layer is the text of its Spec, `KEEP` for float. Its decision is called
`format_of(layer)`, for an axis may have the layer's own name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor, fx

from lighten.costs import Extent, extents, parameter_counts, size_terms
from lighten.decide import Decision, Term, Values
from lighten.format_errors import FormatErrors
from lighten.latency_operators import Operator
from lighten.latency_table import LatencyTable
from lighten.latency_terms import operator_terms
from lighten.mixture import Touch
from lighten.network import Network, weighted
from lighten.types import Axis, Spec

KEEP = str(Spec())

_CHANNEL = 13.0
"""Bytes of an integer weight for each of its outputs: scale 4, zero 1, scale and codes of the bias
8, of which 4 stood there before and are counted with the parameters."""


@dataclass(frozen=True)
class Predicted:
    """A cost as terms of decisions and what depends on none."""

    terms: Sequence[Term]
    fixed: float

    def __call__(self, values: Values) -> float:
        return self.fixed + sum(term.cost(values) for term in self.terms)


def format_of(layer: str) -> str:
    """What the decision on a layer's format is called."""
    return f"format of {layer}"


def decisions_of(errors: FormatErrors, options: Sequence[str]) -> tuple[list[Decision], list[Term]]:
    """(a decision for each layer, errors that layers share): nats, nothing lost in float.

    options: texts of specs.
    """
    names = {text: Spec.parse(text).format for text in options}
    decisions = [
        Decision(
            format_of(layer), tuple(options),
            tuple(0.0 if (n := names[text]) is None else each[n] for text in options),
        )
        for layer, each in errors.weights.items()
    ]  # fmt: skip
    losses = [
        Term(tuple(sorted(map(format_of, touch.names))), _shared(touch, nats))
        for touch, nats in errors.edges
    ]
    return decisions, losses


def _shared(touch: Touch, nats: float) -> Callable[[Values], float]:
    def lost(values: Values) -> float:
        return nats if touch.rounded(_integers(touch.names, values)) else 0.0

    return lost


def _integers(layers: Iterable[str], values: Values) -> set[str]:
    return {layer for layer in layers if values[format_of(layer)] != KEEP}


# -- bytes ---------------------------------------------------------------------------------------
def byte_terms(
    network: Network, axes: Sequence[Axis], bits: Mapping[str, Mapping[str, float]],
    overhead: float = 0.0,
) -> Predicted:  # fmt: skip
    """Bytes of an exported file. bits: layer -> option -> bits of a stored weight. overhead: what
    an integer layer adds to the file by being one, such as the names of its parts."""
    rest = {name: 4.0 for name in parameter_counts(network) if name not in bits}
    terms, fixed = size_terms(network, axes, rest)
    found = extents(network, axes)
    state = network.module.state_dict()
    for layer, each in bits.items():
        dims = found.get(layer) or tuple(Extent(size, ()) for size in state[layer].shape)
        names = {axis for extent in dims for axis, _ in extent.per}
        terms.append(Term((*sorted(names), format_of(layer)), _stored(layer, dims, each, overhead)))
    return Predicted(terms, fixed)


def _stored(
    layer: str, dims: Sequence[Extent], bits: Mapping[str, float], overhead: float
) -> Callable[[Values], float]:
    name = format_of(layer)

    def cost(values: Values) -> float:
        option = values[name]
        sizes = [extent.at(values) for extent in dims]
        extra = 0.0 if option == KEEP else overhead + _CHANNEL * sizes[0]
        return prod(sizes) * bits[option] / 8 + extra

    return cost


# -- milliseconds --------------------------------------------------------------------------------
def time_terms(
    network: Network, axes: Sequence[Axis], layers: Sequence[str],
    table: Callable[[bool], LatencyTable],
) -> Predicted:  # fmt: skip
    """Milliseconds of an exported file: operators in float or in int8, and the conversions where
    one follows the other.

    layers: those that have a decision, all others are float. table: of int8 operators, or float.
    """
    plain = table(False)
    floats = operator_terms(network, axes, plain)
    integers = operator_terms(network, axes, table(True))
    able = set(layers)
    weights = dict(weighted(network.graph))
    own = {node: name for node, name in weights.items() if name in able}
    found = extents(network, axes)
    terms, fixed = [], 0.0
    for node in network.graph.graph.nodes:
        if node in own:
            near = {own[node]}
        elif node in weights:
            near = set()
        else:
            near = _reached(node, own, back=True) | _reached(node, own, back=False)
        if node.name in floats:
            pair = floats[node.name], integers[node.name]
            if near or pair[0].names:
                names = (*pair[0].names, *sorted(map(format_of, near)))
                terms.append(Term(names, _either(near, *pair)))
            else:
                fixed += pair[0].cost({})
    base = plain.milliseconds(Operator("stream"))
    each = (plain.milliseconds(Operator("stream", elements=1_000_000)) - base) / 1e6
    for node, layer in own.items():
        readers = _reached(node, own, back=False)
        value = node.meta["val"]
        if not readers or not isinstance(value, Tensor):
            continue
        dims = found.get(layer)
        outputs = dims[0] if dims else Extent(int(node.args[1].meta["val"].shape[0]), ())  # type: ignore[union-attr]
        positions = value[:1].numel() / int(node.args[1].meta["val"].shape[0])  # type: ignore[union-attr]
        around = {layer, *readers}
        names = (*sorted({a for a, _ in outputs.per}), *sorted(map(format_of, around)))
        terms.append(Term(names, _conversion(around, outputs, base, 2 * each * positions)))
    return Predicted(terms, fixed)


def _either(near: set[str], plain: Term, integer: Term) -> Callable[[Values], float]:
    """In int8 where all layers around are."""

    def cost(values: Values) -> float:
        whole = bool(near) and len(_integers(near, values)) == len(near)
        return (integer if whole else plain).cost(values)

    return cost


def _conversion(
    around: set[str], outputs: Extent, base: float, per_channel: float
) -> Callable[[Values], float]:
    """Of a tensor from integers to float or back, where the layers around it are not all alike."""

    def cost(values: Values) -> float:
        count = len(_integers(around, values))
        return 0.0 if count in (0, len(around)) else base + per_channel * outputs.at(values)

    return cost


def _reached(node: fx.Node, own: Mapping[fx.Node, str], *, back: bool) -> set[str]:
    """The layers that are reached first from a node, against or with the flow."""
    found, seen, queue = set(), {node}, [node]
    while queue:
        here = queue.pop()
        for other in here.all_input_nodes if back else here.users:
            if other in seen or other.op == "get_attr":
                continue
            seen.add(other)
            if other in own:
                found.add(own[other])
            else:
                queue.append(other)
    return found
