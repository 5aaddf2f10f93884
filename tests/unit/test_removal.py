"""The order of removal against least squares done from scratch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lighten.errors import BadInput, WrongUse
from lighten.removal import Reading, compensated, removal

RIDGE = 1e-4


def reading(width: int, k: int, out: int, seed: int, still: int = 0) -> Reading:
    g = torch.Generator().manual_seed(seed)
    n = width * k + still
    x = torch.randn(200, n, generator=g) @ torch.randn(n, n, generator=g)
    weight = torch.randn(out, n, generator=g)
    columns = torch.randperm(n, generator=g)[: width * k].view(width, k)
    h = x.T @ x / len(x)
    return Reading(weight, (h + h.T) / 2, columns)


def best_error(r: Reading, removed: list[int]) -> float:
    """The damped error of the best weights without these units' columns, solved directly."""
    h = r.covariance.double()
    h = h + RIDGE * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    gone = r.columns[removed].flatten()
    kept = torch.tensor([i for i in range(len(h)) if i not in set(gone.tolist())])
    w = r.weight.double()
    delta = w.clone()
    if len(kept):
        delta[:, kept] -= w @ h[:, kept] @ torch.linalg.inv(h[kept][:, kept])
    return float(((delta @ h) * delta).sum())


@pytest.mark.parametrize(("k", "still"), [(1, 0), (3, 0), (2, 4)])
def test_errors_are_those_of_least_squares_from_scratch(k: int, still: int) -> None:
    readings = [reading(5, k, 4, 0, still), reading(5, 1, 3, 1)]
    order, error = removal(readings, RIDGE)
    assert sorted(order.tolist()) == list(range(5))
    for kept in range(6):
        gone = order[: 5 - kept].tolist()
        expected = sum(best_error(r, gone) for r in readings)
        assert float(error[kept]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_every_step_removes_the_unit_that_costs_least() -> None:
    readings = [reading(6, 2, 3, 2), reading(6, 3, 2, 3)]
    order = removal(readings, RIDGE)[0].tolist()
    for step in range(6):
        rest = [u for u in range(6) if u not in order[:step]]
        costs = {u: sum(best_error(r, [*order[:step], u]) for r in readings) for u in rest}
        assert order[step] == min(costs, key=costs.__getitem__)


def test_greedy_finds_a_redundant_pair_that_magnitude_does_not() -> None:
    r = reading(4, 1, 3, 4)
    double = r.columns[1, 0], r.columns[2, 0]
    h = r.covariance.clone()
    h[double[0]] = h[double[1]]
    h[:, double[0]] = h[:, double[1]]
    h[double[0], double[0]] = h[double[1], double[1]]
    weight = r.weight * (1 + 9 * (torch.arange(4) == double[0]))
    order, error = removal([Reading(weight, h, r.columns)], 1e-8)
    assert order[0] in (1, 2)
    assert float(error[3]) < 1e-5 * float(error[0])


def test_several_at_once_is_the_same_set_of_errors() -> None:
    r = reading(8, 1, 3, 5)
    order, error = removal([r], RIDGE, at_once=3)
    assert sorted(order.tolist()) == list(range(8))
    for kept in (0, 2, 5):
        assert float(error[kept]) == pytest.approx(best_error(r, order[: 8 - kept].tolist()))


def test_importance_weighs_outputs() -> None:
    r = reading(4, 1, 2, 6)
    only_first = Reading(r.weight, r.covariance, r.columns, torch.tensor([1.0, 0.0]))
    alone = Reading(r.weight[:1], r.covariance, r.columns)
    torch.testing.assert_close(removal([only_first])[1], removal([alone])[1])


def test_compensated_is_the_least_squares_weight() -> None:
    r = reading(5, 2, 3, 7)
    _, error = removal([r], RIDGE)
    for kept in itertools.combinations(range(5), 3):
        columns = r.columns[list(kept)].flatten().sort().values
        found = compensated(r.weight, r.covariance, columns, RIDGE)
        gone = [u for u in range(5) if u not in kept]
        assert not bool(found[:, r.columns[gone].flatten()].any())
        assert damped(r, found) == pytest.approx(best_error(r, gone), rel=1e-4)
    assert float(error[5]) == 0


def damped(r: Reading, found: Tensor) -> float:
    h = r.covariance.double()
    h = h + RIDGE * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    d = r.weight.double() - found.double()
    return float(((d @ h) * d).sum())


def test_mistakes_are_named() -> None:
    with pytest.raises(WrongUse, match="widths"):
        removal([reading(4, 1, 2, 0), reading(5, 1, 2, 0)])
    bad = reading(3, 1, 2, 0)
    bad.covariance[0, 0] = torch.nan
    with pytest.raises(BadInput, match="NaN"):
        removal([bad])
