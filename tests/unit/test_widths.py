"""Curves spent within a budget: limits kept, better than uniform, widths as asked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lighten.costs import parameter_counts, size_terms
from lighten.errors import ImpossibleBudget
from lighten.network import Network
from lighten.types import Axis, Member
from lighten.widths import Curve, branches, keep_of, options, spend, uniform

WIDTH = 16


def member(name: str, dim: int, role: str, per: int = 1) -> Member:
    return Member(name, dim, torch.arange(WIDTH * per).view(WIDTH, per), role)


@pytest.fixture
def network() -> Network:
    module = nn.Sequential(
        nn.Conv2d(3, WIDTH, 3), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3), nn.Flatten(),
        nn.Linear(WIDTH * 4, 5),
    )  # fmt: skip
    return Network.of(module, torch.zeros(1, 3, 6, 6))


@pytest.fixture
def axes() -> list[Axis]:
    first = (
        member("0.weight", 0, "writes"), member("0.bias", 0, "carries"),
        member("2.weight", 1, "reads"),
    )  # fmt: skip
    second = (
        member("2.weight", 0, "writes"), member("2.bias", 0, "carries"),
        member("4.weight", 1, "reads", 4),
    )  # fmt: skip
    return [Axis("a", WIDTH, "channels", first), Axis("b", WIDTH, "channels", second)]


def curve(scale: float) -> Curve:
    error = scale * (1 - torch.arange(WIDTH + 1) / WIDTH) ** 2
    error[0] = torch.inf
    return Curve(torch.arange(WIDTH), error)


def test_terms_are_the_parameters_of_the_network(network: Network, axes: list[Axis]) -> None:
    terms, fixed = size_terms(network, axes, parameter_counts(network))
    full = {"a": WIDTH, "b": WIDTH}
    assert fixed + sum(t.cost(full) for t in terms) == network.parameters
    narrow = {"a": 4, "b": 6}
    count = (4 * 27 + 4) + (6 * 4 * 9 + 6) + (5 * 6 * 4 + 5)
    assert fixed + sum(t.cost(narrow) for t in terms) == count


def test_the_axis_that_loses_less_is_narrowed_more(network: Network, axes: list[Axis]) -> None:
    terms, fixed = size_terms(network, axes, parameter_counts(network))
    curves = {"a": curve(1.0), "b": curve(0.05)}
    limit = 0.5 * network.parameters
    widths = spend(axes, curves, terms, limit, fixed)
    assert widths["b"] < widths["a"]
    assert fixed + sum(t.cost(widths) for t in terms) <= limit
    plain = uniform(axes, curves, terms, limit, fixed)
    assert plain["a"] == plain["b"]
    loss = {n: sum(float(curves[k].error[v]) for k, v in w.items())
            for n, w in (("ours", widths), ("plain", plain))}  # fmt: skip
    assert loss["ours"] < loss["plain"]


def test_widths_are_multiples_or_whole(network: Network, axes: list[Axis]) -> None:
    terms, fixed = size_terms(network, axes, parameter_counts(network))
    curves = {"a": curve(1.0), "b": curve(1.0)}
    for share in (0.3, 0.5, 0.7, 0.99):
        widths = spend(axes, curves, terms, share * network.parameters, fixed, multiple=4)
        assert all(w % 4 == 0 and w > 0 for w in widths.values())


def test_locked_axes_stay(network: Network, axes: list[Axis]) -> None:
    axes[0] = Axis("a", WIDTH, "channels", axes[0].members, locked="because")
    terms, fixed = size_terms(network, axes[1:], parameter_counts(network))
    widths = spend(axes, {"a": curve(1), "b": curve(1)}, terms, 0.7 * network.parameters, fixed)
    assert set(widths) == {"b"}


def test_what_is_kept_is_what_goes_last() -> None:
    made = Curve(torch.tensor([2, 0, 3, 1]), torch.zeros(5))
    assert made.kept(2).tolist() == [1, 3]
    assert keep_of({"x": made}, {"x": 4}) == {}
    assert keep_of({"x": made}, {"x": 1})["x"].tolist() == [1]


def test_a_curve_is_made_monotone() -> None:
    axis = Axis("x", 3, "channels", ())
    found = options(axis, Curve(torch.arange(3), torch.tensor([9.0, 1.0, 2.0, 0.0])))
    assert found.values == (0, 1, 2, 3)
    assert found.errors == (9.0, 2.0, 2.0, 0.0)


def test_an_impossible_budget(network: Network, axes: list[Axis]) -> None:
    terms, fixed = size_terms(network, axes, parameter_counts(network))
    curves = {"a": curve(1.0), "b": curve(1.0)}
    for way in (spend, uniform):
        with pytest.raises(ImpossibleBudget):
            way(axes, curves, terms, 20, fixed)


def test_a_stream_is_written_by_several_and_may_be_held(network: Network, axes: list[Axis]) -> None:
    stream = Axis("s", WIDTH, "channels", (member("x", 0, "writes"), member("y", 0, "writes")))
    assert branches([*axes, stream]) == axes
    terms, fixed = size_terms(network, axes, parameter_counts(network))
    curves = {"a": curve(1e-6), "b": curve(1.0)}
    for way in (spend, uniform):
        widths = way(axes, curves, terms, 0.6 * network.parameters, fixed, held={"a"})
        assert widths["a"] == WIDTH
        assert widths["b"] < WIDTH
