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
