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
@dataclass(frozen=True)
class Scale:
    """What the times of single operators are off by inside a whole network."""

    floats: float = 1.0
    integers: float = 1.0
    conversions: float = 1.0


@dataclass(frozen=True)
class _Operator:
    """One operator, in int8 where all layers around it are."""

    near: frozenset[str]
    plain: Term
    integer: Term

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.plain.names, *sorted(map(format_of, self.near)))

    def parts(self, values: Values) -> Scale:
        whole = bool(self.near) and len(_integers(self.near, values)) == len(self.near)
        if whole:
            return Scale(0.0, self.integer.cost(values), 0.0)
        return Scale(self.plain.cost(values), 0.0, 0.0)


@dataclass(frozen=True)
class _Conversion:
    """A tensor from integers to float or back, where the layers around it are not all alike."""

    around: frozenset[str]
    outputs: Extent
    base: float
    per_channel: float

    @property
    def names(self) -> tuple[str, ...]:
        axes = sorted({axis for axis, _ in self.outputs.per})
        return (*axes, *sorted(map(format_of, self.around)))

    def parts(self, values: Values) -> Scale:
        count = len(_integers(self.around, values))
        if count in (0, len(self.around)):
            return Scale(0.0, 0.0, 0.0)
        return Scale(0.0, 0.0, self.base + self.per_channel * self.outputs.at(values))


@dataclass(frozen=True)
class Times:
    """Milliseconds of an exported file, by what they are spent on."""

    every: Sequence[_Operator | _Conversion]

    def parts(self, values: Values) -> Scale:
        """Milliseconds of float operators, of int8 operators and of conversions."""
        found = [one.parts(values) for one in self.every]
        return Scale(
            sum(f.floats for f in found), sum(f.integers for f in found),
            sum(f.conversions for f in found),
        )  # fmt: skip

    def predicted(self, scale: Scale) -> Predicted:
        """As terms of decisions."""
        return Predicted([Term(one.names, _scaled(one, scale)) for one in self.every], 0.0)

    def fitted(self, integers: Measured, floats: Measured, mixed: Measured) -> Scale:
        """The scale that explains three real times: of a network in int8, in float, and of one in
        which they meet often. What that costs is seen in no single operator: runtimes have another
        layout for each kind, and change it too."""
        whole = self.parts(floats[0]).floats
        per_float = floats[1] / whole if whole else 1.0
        rest = self.parts(integers[0])
        left = integers[1] - per_float * rest.floats
        per_integer = max(left, 0.0) / rest.integers if rest.integers else 1.0
        both = self.parts(mixed[0])
        left = mixed[1] - per_float * both.floats - per_integer * both.integers
        per_conversion = left / both.conversions if both.conversions else 1.0
        return Scale(per_float, per_integer, max(1.0, per_conversion))


Measured = tuple[Values, float]
"""A choice, and what it really took."""


def _scaled(one: _Operator | _Conversion, scale: Scale) -> Callable[[Values], float]:
    def cost(values: Values) -> float:
        parts = one.parts(values)
        return (
            scale.floats * parts.floats
            + scale.integers * parts.integers
            + scale.conversions * parts.conversions
        )

    return cost


def time_terms(
    network: Network, axes: Sequence[Axis], layers: Sequence[str],
    table: Callable[[bool], LatencyTable],
) -> Times:  # fmt: skip
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
    every: list[_Operator | _Conversion] = []
    for node in network.graph.graph.nodes:
        if node.name not in floats:
            continue
        if node in weights:
            near = {own[node]} if node in own else set()
        else:
            near = _reached(node, own, back=True) | _reached(node, own, back=False)
        every.append(_Operator(frozenset(near), floats[node.name], integers[node.name]))
    base = plain.milliseconds(Operator("stream"))
    each = (plain.milliseconds(Operator("stream", elements=1_000_000)) - base) / 1e6
    for node, layer in own.items():
        readers = _reached(node, own, back=False)
        value = node.meta["val"]
        if not readers or not isinstance(value, Tensor):
            continue
        channels = int(node.args[1].meta["val"].shape[0])  # type: ignore[union-attr]
        dims = found.get(layer)
        outputs = dims[0] if dims else Extent(channels, ())
        per_channel = 2 * each * value[:1].numel() / channels
        every.append(_Conversion(frozenset({layer, *readers}), outputs, base, per_channel))
    return Times(every)


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
