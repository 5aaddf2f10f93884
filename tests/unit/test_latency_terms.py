"""Milliseconds as terms of widths, looked up in a table that is made up here."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lighten.coupling import Couplings, couple
from lighten.decide import Term
from lighten.latency_operators import Operator, operators
from lighten.latency_table import LatencyTable
from lighten.latency_terms import MOST_SHAPES, latency_terms
from lighten.network import Network
from small_networks import Plain, Residual, images, trained


class Table:
    """An operator costs its products and a little for what it moves; counts what is measured."""

    def __init__(self) -> None:
        self.measured: list[Operator] = []
        self.calls = 0

    def measure(self, operators: Iterable[Operator]) -> None:
        self.calls += 1
        self.measured += operators

    def milliseconds(self, operator: Operator) -> float:
        o = operator
        if o.kind == "stream":
            return 1e-6 * o.elements
        assert o in self.measured, f"{o} is looked up before it is measured"
        pixels = math.prod(o.size)
        products = o.inputs // o.groups * o.outputs * math.prod(o.kernel) * pixels
        return 1e-6 * products + 1e-6 * (o.inputs + o.outputs) * pixels + 0.001

    def total(self, operators: Iterable[Operator]) -> float:
        known = list(operators)
        self.measure(known)
        return sum(self.milliseconds(o) for o in known)


class Wide(nn.Module):
    """A concat, a pooling and a widening depthwise convolution: axes meet in one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 24, 3, padding=1)
        self.right = nn.Conv2d(3, 16, 1)
        self.depth = nn.Conv2d(40, 40, 3, padding=1, groups=40)
        self.join = nn.Conv2d(40, 12, 1)
        self.group = nn.Conv2d(12, 12, 3, padding=1, groups=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        x = self.join(torch.max_pool2d(self.depth(x).relu(), 2))
        return self.head(self.group(x.sigmoid()).mean((2, 3)))


KINDS = {"plain": Plain, "residual": Residual, "wide": Wide}


@cache
def made(kind: str) -> tuple[Network, Couplings]:
    network = Network.of(trained(KINDS[kind]), images(2))
    return network, couple(network)


def terms_of(kind: str, table: Table, multiple: int = 8) -> tuple[list[Term], float]:
    network, couplings = made(kind)
    return latency_terms(network, couplings.free, cast(LatencyTable, table), multiple)


def cost(found: tuple[list[Term], float], widths: dict[str, int]) -> float:
    terms, fixed = found
    return fixed + sum(term.cost(widths) for term in terms)


@pytest.mark.parametrize("multiple", [1, 8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_widths_cost_what_the_operators_do(kind: str, multiple: int) -> None:
    network, couplings = made(kind)
    found = terms_of(kind, Table(), multiple)
    whole = {axis.name: axis.width for axis in couplings.free}
    assert whole
    expected = Table().total(operators(network).values())
    assert cost(found, whole) == pytest.approx(expected)
    assert found[0], "nothing depends on widths"


@pytest.mark.parametrize("kind", KINDS)
def test_narrower_is_never_dearer(kind: str) -> None:
    _, couplings = made(kind)
    found = terms_of(kind, Table())
    whole = {axis.name: axis.width for axis in couplings.free}
    for axis in couplings.free:
        costs = [cost(found, whole | {axis.name: w}) for w in range(1, axis.width + 1)]
        assert all(a <= b + 1e-12 for a, b in pairwise(costs)), axis.name
        assert costs[0] < costs[-1], axis.name
    assert cost(found, dict.fromkeys(whole, 1)) < 0.7 * cost(found, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrower_network_costs_what_is_predicted(kind: str) -> None:
    """At widths that are measured, terms say what the operators of the smaller network do."""
    from lighten.shrink import shrink

    network, couplings = made(kind)
    found = terms_of(kind, Table())
    axes = [a for a in couplings.free if a.width > 8]
    widths = {a.name: a.width for a in couplings.free} | {a.name: 8 for a in axes}
    keep = {a.name: torch.arange(8) for a in axes}
    small = shrink(network, couplings, keep)
    expected = Table().total(operators(small).values())
    assert cost(found, widths) == pytest.approx(
        expected, rel=0.02
    )  # a concat is taken to shrink as its first part


@pytest.mark.parametrize("kind", KINDS)
def test_all_is_measured_at_once_and_not_too_much(kind: str) -> None:
    network, _ = made(kind)
    table = Table()
    terms_of(kind, table)
    assert table.calls == 1
    timed = [o for o in table.measured if o.kind != "stream"]
    assert len(timed) <= MOST_SHAPES * len(operators(network))
    assert all(o.inputs >= 1 and o.outputs >= 1 for o in timed)


def test_no_axis_means_no_term() -> None:
    network, _ = made("residual")
    terms, fixed = latency_terms(network, [], cast(LatencyTable, Table()))
    assert terms == []
    assert fixed == pytest.approx(Table().total(operators(network).values()))
