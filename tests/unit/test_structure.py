"""The real cost meets the budget, however wrong the prediction."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lighten.coupling import Couplings, couple
from lighten.curves import curves
from lighten.decide import Term
from lighten.errors import ImpossibleBudget
from lighten.macs import macs
from lighten.network import Network
from lighten.network_cost import counted
from lighten.structure import TURNS, Narrowed, Spend, at_widths, free, narrow
from lighten.widths import Curve, spend, uniform
from small_networks import Residual, images, trained

DATA = images(32)


@cache
def made() -> tuple[Network, Couplings, dict[str, Curve]]:
    network = Network.of(trained(Residual), DATA[:2])
    couplings = couple(network)
    return network, couplings, curves(network, couplings, DATA)


class Biased:
    """Multiply-adds, taken to be `factor` times as many plus `extra`; counts what is really asked.

    The real cost has an overhead of `real` that the prediction knows nothing of.
    """

    def __init__(
        self, factor: float = 1.0, extra: float = 0.0, real: float = 0.0, tolerance: float = 0.05
    ) -> None:
        network, couplings, _ = made()
        true = counted(network, couplings.free, "macs")
        self.asked = 0

        def actual(candidate: Network) -> float:
            self.asked += 1
            return macs(candidate).total + real

        terms = [Term(t.names, partial(_times, factor, t.cost)) for t in true.terms]
        self.spend = Spend(terms, factor * true.fixed + extra, actual, tolerance)

    def narrowed(
        self, limit: float, way: Callable[..., dict[str, int]] = spend, multiple: int = 1
    ) -> Narrowed:
        network, couplings, found = made()
        axes, spent = free(couplings.axes, found), self.spend
        return narrow(
            network, couplings, found, spent, limit,
            lambda target: way(axes, found, spent.terms, target, spent.fixed, multiple),
        )  # fmt: skip


def _times(factor: float, cost: Callable[..., float], widths: object) -> float:
    return factor * cost(widths)


@pytest.mark.parametrize("way", [spend, uniform])
@pytest.mark.parametrize("factor", [0.2, 0.7, 1.0, 1.4, 5.0])
def test_a_prediction_that_is_off_by_a_factor(
    way: Callable[..., dict[str, int]], factor: float
) -> None:
    whole = macs(made()[0]).total
    job = Biased(factor)
    found = job.narrowed(0.5 * whole, way)
    assert 0.4 * whole <= found.cost <= 0.5 * whole
    assert found.cost == macs(found.network).total
    assert job.asked <= TURNS + 1


@pytest.mark.parametrize("extra", [-0.1, 0.3])
@pytest.mark.parametrize("real", [0.0, 0.2, 4.0])
def test_a_prediction_that_leaves_things_out(extra: float, real: float) -> None:
    whole = macs(made()[0]).total
    job = Biased(1.0, extra * whole, real * whole)
    found = job.narrowed((0.6 + real) * whole)
    assert (0.5 + real) * whole <= found.cost <= (0.6 + real) * whole
    assert job.asked <= TURNS + 1


def test_a_cost_that_jumps_is_met_all_the_same() -> None:
    """A runtime's kernels work in blocks: some budgets cannot be spent in full."""
    whole = macs(made()[0]).total
    job = Biased(2.0, 0.1 * whole)
    found = job.narrowed(0.5 * whole, multiple=8)
    assert found.cost <= 0.5 * whole
    assert all(width % 8 == 0 for width in found.widths.values())


def test_what_is_found_is_what_its_widths_say() -> None:
    network, couplings, found = made()
    job = Biased(0.7)
    small = job.narrowed(0.5 * macs(network).total)
    again = at_widths(network, couplings, found, job.spend, small.widths)
    assert again.cost == small.cost
    assert {k: v.tolist() for k, v in again.keep.items()} == {
        k: v.tolist() for k, v in small.keep.items()
    }
    assert all(len(kept) == small.widths[name] for name, kept in small.keep.items())
    torch.testing.assert_close(again.network(DATA), small.network(DATA))


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_an_impossible_budget_says_the_least_that_is_possible(factor: float) -> None:
    network, couplings, found = made()
    job = Biased(factor)
    least = at_widths(network, couplings, found, job.spend, dict.fromkeys(found, 1)).cost
    with pytest.raises(ImpossibleBudget) as caught:
        job.narrowed(0.9 * least)
    assert f"{least:,.4g}" in caught.value.message
    assert job.narrowed(1.001 * least).cost == least


def test_predictions_at_the_whole_widths() -> None:
    network, couplings, _ = made()
    widths = {axis.name: axis.width for axis in couplings.free}
    for unit, real in (("macs", macs(network).total), ("params", network.parameters)):
        assert counted(network, couplings.free, unit).predicted(widths) == pytest.approx(real)
