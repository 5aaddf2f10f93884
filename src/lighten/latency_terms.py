"""Milliseconds as terms of widths: each operator's time, looked up at the channels it would have.

The table is asked for every shape that any choice of widths can lead to, in one go, before the
first decision; so what is decided meanwhile is only looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import prod

from torch import fx

from lighten.costs import Extent, extents
from lighten.decide import Term, Values
from lighten.latency_operators import Operator, operators
from lighten.latency_table import LatencyTable
from lighten.network import Network, weighted
from lighten.types import Axis

MOST_SHAPES = 64
"""Shapes of one operator that are measured; between them the next larger one counts."""


def latency_terms(
    network: Network, axes: Sequence[Axis], table: LatencyTable, multiple: int = 8
) -> tuple[list[Term], float]:
    """(terms, fixed milliseconds). multiple: widths will be multiples of it, or whole."""
    found = operator_terms(network, axes, table, multiple)
    fixed = sum(term.cost({}) for term in found.values() if not term.names)
    return [term for term in found.values() if term.names], fixed


def operator_terms(
    network: Network, axes: Sequence[Axis], table: LatencyTable, multiple: int = 8
) -> dict[str, Term]:
    """Graph node -> its milliseconds; a term of no decision where no axis lies in it."""
    found = extents(network, axes)
    shapes = operators(network)
    state = network.module.state_dict()
    names = {node.name: name for node, name in weighted(network.graph)}
    grids: dict[str, _Grid] = {}
    fixed: dict[str, Operator] = {}
    for node in network.graph.graph.nodes:
        if node.name not in shapes:
            continue
        operator = shapes[node.name]
        weight = names.get(node.name) or _above(node, names)
        dims = found.get(weight or "")
        if dims is None:
            fixed[node.name] = operator
            continue
        sizes = state[str(weight)].shape
        grids[node.name] = _Grid(operator, dims, tuple(sizes), node.name in names)
    choices = {axis.name: _options(axis.width, multiple) for axis in axes}
    wanted = {name: grid.points(choices) for name, grid in grids.items()}
    table.measure([*(o for points in wanted.values() for o in points.values()), *fixed.values()])
    return {
        **{n: Term(g.axes, _lookup(g, wanted[n], table)) for n, g in grids.items()},
        **{n: Term((), _still(table.milliseconds(o))) for n, o in fixed.items()},
    }


def _still(milliseconds: float) -> Callable[[Values], float]:
    return lambda _: milliseconds


class _Grid:
    """An operator and the axes that its channels belong to."""

    def __init__(
        self, operator: Operator, dims: tuple[Extent, ...], sizes: tuple[int, ...], own: bool
    ) -> None:
        self.operator, self.dims, self.sizes, self.own = operator, dims, sizes, own
        # of a depthwise convolution, inputs are as many as outputs: they are one axis
        deep = operator.groups > 1 and sizes[1] == 1
        used = dims[:2] if own and not deep else dims[:1]
        self.axes = tuple(sorted({axis for dim in used for axis, _ in dim.per}))

    def at(self, widths: Values) -> Operator:
        """The operator at these widths."""
        outputs = self.dims[0].at(widths)
        if not self.own:  # it moves what the weight above it has written
            share = outputs / self.sizes[0]
            o = self.operator
            return o.at(max(1, round(o.inputs * share)), max(1, round(o.outputs * share)))
        if self.operator.groups == 1:
            inputs = self.dims[1].at(widths)
        elif self.sizes[1] == 1:
            inputs = outputs * self.operator.inputs // self.operator.outputs
        else:
            inputs = self.dims[1].at(widths) * self.operator.groups
        return self.operator.at(max(inputs, 1), max(outputs, 1))

    def points(self, choices: Mapping[str, Sequence[int]]) -> dict[tuple[int, ...], Operator]:
        """Widths of `axes` -> operator, for a grid of them that is not too large."""
        lists = [list(choices[axis]) for axis in self.axes]
        while prod(map(len, lists)) > MOST_SHAPES:
            longest = max(range(len(lists)), key=lambda i: len(lists[i]))
            full = lists[longest]
            lists[longest] = full[::2] if full[::2][-1] == full[-1] else [*full[::2], full[-1]]
        return {
            widths: self.at(dict(zip(self.axes, widths, strict=True))) for widths in product(*lists)
        }


def _lookup(
    grid: _Grid, points: Mapping[tuple[int, ...], Operator], table: LatencyTable
) -> Callable[[Values], float]:
    known = {widths: table.milliseconds(operator) for widths, operator in points.items()}
    axes = [sorted({widths[i] for widths in known}) for i in range(len(grid.axes))]

    def cost(widths: Values) -> float:
        """The time at the next measured widths that are not smaller: kernels work in blocks."""
        asked = tuple(
            next((k for k in steps if k >= widths[axis]), steps[-1])
            for axis, steps in zip(grid.axes, axes, strict=True)
        )
        return known[asked]

    return cost


def _options(width: int, multiple: int) -> list[int]:
    """Widths at which times are taken: kernels work in blocks of channels, of 8 mostly."""
    step = max(multiple, 8)
    found = list(range(step, width, step)) or [max(1, width // 2)]
    if len(found) > 10:
        found = [found[round(i * (len(found) - 1) / 9)] for i in range(10)]
    return [*found, width]


def _above(node: fx.Node, names: Mapping[str, str]) -> str | None:
    """The weight whose output reaches this node first."""
    seen, queue = set(), list(node.all_input_nodes)
    while queue:
        source = queue.pop(0)
        if source in seen or source.op != "call_function":
            continue
        seen.add(source)
        if source.name in names:
            return names[source.name]
        queue.extend(source.all_input_nodes)
    return None
