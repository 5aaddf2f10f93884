"""Decisions whose costs multiply: never over the limit, near brute force, exact if separable."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from lighten.decide import Decision, Term, decide
from lighten.errors import ImpossibleBudget


def chain(seed: int, count: int, widths: Sequence[int]) -> tuple[list[Decision], list[Term]]:
    """Layers in a row: layer i costs width i x width i + 1; errors fall with width, convexly."""
    rng = np.random.default_rng(seed)
    decisions = []
    for i in range(count):
        scale = rng.exponential()
        errors = tuple(float(scale * (1 - w / max(widths)) ** 2) for w in widths)
        decisions.append(Decision(f"a{i}", tuple(widths), errors))
    terms = [Term(("a0",), lambda v: 3.0 * v["a0"])]
    for i in range(count - 1):
        terms.append(Term((f"a{i}", f"a{i + 1}"), _product(f"a{i}", f"a{i + 1}")))
    return decisions, terms


def _product(a: str, b: str):  # type: ignore[no-untyped-def]
    return lambda v: float(v[a] * v[b])


def error(decisions: Sequence[Decision], values: dict[str, int]) -> float:
    return sum(d.errors[d.values.index(values[d.name])] for d in decisions)


def brute(decisions: Sequence[Decision], terms: Sequence[Term], limit: float) -> float:
    best = np.inf
    for combination in itertools.product(*(d.values for d in decisions)):
        values = {d.name: v for d, v in zip(decisions, combination, strict=True)}
        if sum(t.cost(values) for t in terms) <= limit:
            best = min(best, error(decisions, values))
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_close_to_brute_force_where_costs_multiply(seed: int, share: float) -> None:
    decisions, terms = chain(seed, 4, [1, 2, 4, 6, 8])
    full = sum(t.cost({d.name: 8 for d in decisions}) for t in terms)
    chosen = decide(decisions, terms, share * full)
    assert sum(t.cost(chosen) for t in terms) <= share * full
    best, worst = brute(decisions, terms, share * full), sum(d.errors[0] for d in decisions)
    assert error(decisions, chosen) <= best + 0.12 * (worst - best) + 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_exact_where_costs_add_up(seed: int) -> None:
    rng = np.random.default_rng(seed)
    decisions = [
        Decision(f"d{i}", tuple(range(5)), tuple(map(float, rng.permutation(5)))) for i in range(4)
    ]
    price = {d.name: rng.integers(1, 9, 5) for d in decisions}
    terms = [Term((n,), lambda v, n=n: float(price[n][v[n]])) for n in price]  # type: ignore[misc]
    limit = float(rng.integers(8, 30))
    if brute(decisions, terms, limit) == np.inf:
        with pytest.raises(ImpossibleBudget):
            decide(decisions, terms, limit)
    else:
        assert error(decisions, decide(decisions, terms, limit)) == brute(decisions, terms, limit)


def test_a_budget_with_room_for_all_changes_nothing() -> None:
    decisions, terms = chain(0, 4, [1, 4, 8])
    assert decide(decisions, terms, 1e9) == {d.name: 8 for d in decisions}


def test_a_fixed_cost_counts() -> None:
    decisions, terms = chain(0, 3, [1, 4, 8])
    least = sum(t.cost({d.name: 1 for d in decisions}) for t in terms)
    with pytest.raises(ImpossibleBudget, match="least that is possible"):
        decide(decisions, terms, least, fixed=1.0)
    assert decide(decisions, terms, least + 1.0, fixed=1.0) == {d.name: 1 for d in decisions}


# -- errors that decisions share: a tensor is rounded if either layer at it is in integers --------
WIDTHS, FORMATS = (2, 4, 6), ("float", "int8", "int4")
SIZE = {"float": 4.0, "int8": 1.0, "int4": 0.5}


def mixed(seed: int) -> tuple[list[Decision], list[Term], list[Term]]:
    """Three layers between four tensors, two of them with a width: cost is in x out x size."""
    rng = np.random.default_rng(seed)
    decisions = []
    for i in range(2):
        scale = float(rng.exponential())
        errors = tuple(scale * (1 - w / max(WIDTHS)) ** 2 for w in WIDTHS)
        decisions.append(Decision(f"a{i}", WIDTHS, errors))
    for i in range(3):
        scale = 0.3 * float(rng.exponential())
        decisions.append(Decision(f"f{i}", FORMATS, (0.0, scale / 30, scale)))

    def size(i: int) -> Term:
        names = tuple(n for n in (f"a{i - 1}", f"a{i}") if n in ("a0", "a1"))
        return Term(
            (*names, f"f{i}"),
            lambda v: float(np.prod([v[n] for n in names])) * SIZE[v[f"f{i}"]],
        )

    def edge(i: int) -> Term:
        names, nats = (f"f{i}", f"f{i + 1}"), 0.1 * float(rng.exponential())
        return Term(names, lambda v: 0.0 if all(v[n] == "float" for n in names) else nats)

    return decisions, [size(i) for i in range(3)], [edge(i) for i in range(2)]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("share", [0.1, 0.2, 0.4, 0.8])
def test_widths_and_formats_close_to_brute_force(seed: int, share: float) -> None:
    decisions, terms, losses = mixed(seed)
    widest = {d.name: d.values[-1] if d.name[0] == "a" else "float" for d in decisions}
    limit = share * sum(t.cost(widest) for t in terms)
    chosen = decide(decisions, terms, limit, losses=losses)
    assert sum(t.cost(chosen) for t in terms) <= limit

    def lost(values: dict[str, int]) -> float:
        return error(decisions, values) + sum(t.cost(values) for t in losses)

    every = [
        dict(zip([d.name for d in decisions], values, strict=True))
        for values in itertools.product(*(d.values for d in decisions))
    ]
    fits = [lost(v) for v in every if sum(t.cost(v) for t in terms) <= limit]
    assert lost(chosen) <= min(fits) + 0.1 * (max(fits) - min(fits)) + 1e-12


def test_formats_that_only_gain_together_are_moved_together() -> None:
    """The cheap layers between dear tensors: one alone in float saves nothing."""
    decisions = [Decision(f"f{i}", ("float", "int8"), (0.0, 1e-3)) for i in range(4)]
    terms = [
        Term((d.name,), lambda v, n=d.name: 4.0 if v[n] == "float" else 1.0) for d in decisions
    ]  # type: ignore[misc]
    losses = [
        Term(("f1", "f2"), lambda v: 0.0 if v["f1"] == v["f2"] == "float" else 1.0),
        Term(("f0", "f3"), lambda v: 0.0 if v["f0"] == v["f3"] == "float" else 0.1),
    ]
    found = decide(decisions, terms, 10.0, losses=losses)
    assert found == {"f0": "int8", "f1": "float", "f2": "float", "f3": "int8"}


def test_a_start_in_float_does_not_hide_the_cheapest() -> None:
    """Where two layers touch, a change of format costs more than either saves alone."""
    names = ("f0", "f1")
    decisions = [Decision(n, ("float", "int8"), (0.0, 1.0)) for n in names]
    terms = [
        *(Term((n,), lambda v, n=n: 2.0 if v[n] == "float" else 1.0) for n in names),  # type: ignore[misc]
        Term(names, lambda v: 3.0 * (v["f0"] != v["f1"])),
    ]
    losses = [Term(names, lambda v: 0.0)]
    assert decide(decisions, terms, 2.0, losses=losses) == dict.fromkeys(names, "int8")
