"""Allocation against brute force: optimal, within the budget to the byte, honest when it cannot."""

from __future__ import annotations

import itertools
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten import knapsack as knapsack_module
from lighten.allocate import allocate, allocate_error, uniform
from lighten.errors import ImpossibleBudget
from lighten.knapsack import Options, knapsack
from lighten.types import Budget, Candidate, Plan

many = settings(max_examples=150, deadline=None)
# sizes and errors that collide, on purpose, and errors of every magnitude
options = st.lists(
    st.tuples(
        st.integers(0, 12) | st.integers(0, 10**8),
        st.integers(0, 6).map(float) | st.floats(1e-12, 1e-6) | st.floats(1e-6, 1e3),
    ),
    min_size=1,
    max_size=4,
)
problems = st.lists(options, min_size=1, max_size=5)


def candidates(problem: list[list[tuple[int, float]]]) -> list[Candidate]:
    return [
        Candidate(f"unit{u}", {f"unit{u}": f"f{i}"}, error, {"bytes": float(size)})
        for u, unit in enumerate(problem)
        for i, (size, error) in enumerate(unit)
    ]


def choices(problem: list[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """(bytes, error) of every plan there is."""
    every = itertools.product(*problem)
    return [(sum(size for size, _ in one), sum(error for _, error in one)) for one in every]


def cost(problem: list[list[tuple[int, float]]], plan: Plan) -> tuple[int, float]:
    """(bytes, error) of a plan, counted again from its specs."""
    one = [unit[int(plan.specs[f"unit{u}"][1:])] for u, unit in enumerate(problem)]
    return sum(size for size, _ in one), sum(error for _, error in one)


@given(problem=problems, share=st.floats(0, 1.1), fixed=st.integers(0, 1000))
@many
def test_the_plan_is_the_best_of_all_that_fit(
    problem: list[list[tuple[int, float]]], share: float, fixed: int
) -> None:
    every = choices(problem)
    smallest, largest = min(every)[0], max(every)[0]
    limit = fixed + int(smallest + share * (largest - smallest))
    plan = allocate(candidates(problem), limit, fixed)
    size, error = cost(problem, plan)
    assert size + fixed <= limit
    assert error <= min(e for s, e in every if s + fixed <= limit) * (1 + 1e-9)
    assert plan.predicted == {"bytes": size + fixed, "nats": pytest.approx(error)}


@given(problem=problems, share=st.floats(0, 1.1))
@many
def test_the_smallest_plan_that_loses_no_more(
    problem: list[list[tuple[int, float]]], share: float
) -> None:
    every = choices(problem)
    least, most = (pick(e for _, e in every) for pick in (min, max))
    allowed = least + share * (most - least)
    plan = allocate_error(candidates(problem), allowed)
    size, error = cost(problem, plan)
    assert error <= allowed * (1 + 1e-12)
    assert size <= min(s for s, e in every if e <= allowed * (1 - 1e-12) or e == least)


@given(problem=problems, seed=st.integers(0, 99))
@many
def test_what_is_beaten_in_both_is_never_chosen(
    problem: list[list[tuple[int, float]]], seed: int
) -> None:
    every = sorted(choices(problem))
    limit = random.Random(seed).choice(every)[0]
    plan = allocate(candidates(problem), limit)
    for u, unit in enumerate(problem):
        size, error = unit[int(plan.specs[f"unit{u}"][1:])]
        assert not any(s <= size and e <= error and (s, e) != (size, error) for s, e in unit)


@given(problem=problems, seed=st.integers(0, 99))
@many
def test_the_order_of_candidates_does_not_matter(
    problem: list[list[tuple[int, float]]], seed: int
) -> None:
    limit = sum(max(size for size, _ in unit) for unit in problem) // 2
    limit = max(limit, sum(min(size for size, _ in unit) for unit in problem))
    given = candidates(problem)
    mixed = random.Random(seed).sample(given, len(given))
    first, second = allocate(given, limit), allocate(mixed, limit)
    assert cost(problem, first)[1] == pytest.approx(cost(problem, second)[1], rel=1e-9)
    assert allocate(given, limit) == first


def test_an_impossible_budget_says_the_smallest_possible() -> None:
    rows = candidates([[(86_000_000, 1.0)], [(40_123, 1.0), (90_000, 0.5)]])
    with pytest.raises(ImpossibleBudget) as caught:
        allocate(rows, 80_000_000, fixed=1_000_000)
    assert "80.00 MB" in caught.value.message
    assert "87.04 MB" in caught.value.message
    asked = Budget.parse(re.search(r"ask for (\S+)", caught.value.hint)[1])  # type: ignore[index]
    assert allocate(rows, int(asked.value), 1_000_000).predicted["bytes"] <= int(asked.value)
    with pytest.raises(ImpossibleBudget, match=r"3\.0 kB cannot be met.* 40\.1 kB") as caught:
        allocate(rows[1:], 3000)
    assert "ask for 40.2kB" in caught.value.hint


def test_the_smallest_possible_budget_is_possible() -> None:
    rows = candidates([[(1234567, 1.0), (7654321, 0.0)], [(7, 3.0)]])
    assert allocate(rows, 1234574 + 11, 11).specs == {"unit0": "f0", "unit1": "f0"}
    with pytest.raises(ImpossibleBudget):
        allocate(rows, 1234574 + 10, 11)


def test_an_impossible_loss_says_the_least_possible() -> None:
    rows = candidates([[(9, 0.25)], [(9, 0.5), (3, 0.75)]])
    with pytest.raises(ImpossibleBudget, match=r"0\.5 nats; the best are predicted 0\.75"):
        allocate_error(rows, 0.5)
    assert allocate_error(rows, 0.75).specs["unit1"] == "f0"
    assert allocate_error(candidates([[(9, 0.0), (4, 0.1)]]), 0.0).specs == {"unit0": "f0"}


def test_no_byte_over_the_budget_of_a_real_size() -> None:
    """Absolute tolerances of a solver must not buy a plan some bytes too large."""
    sizes = np.random.default_rng(0).integers(10**6, 10**8, (60, 6))
    problem = [[(int(s), 1e8 - float(s)) for s in unit] for unit in sizes]
    rows = candidates(problem)  # every byte is worth the same, so the best plan is full
    for limit in (2_000_000_001, 2_345_678_912, 3_141_592_653):
        size, _ = cost(problem, allocate(rows, limit))
        assert limit - 100 < size <= limit


def test_a_large_problem_is_solved_to_the_linear_bound() -> None:
    """With 500 units the whole-numbered optimum lies within a hair of the fractional one."""
    g = np.random.default_rng(1)
    units = []
    for _ in range(500):
        bits, size = np.sort(g.uniform(2, 9, 10)), g.uniform(1e5, 1e6)
        units.append(Options(g.lognormal() * 4.0**-bits, size * bits))
    room = sum(float(u.weight.mean()) for u in units)
    chosen = knapsack(units, room)
    total = sum(u.cost[i] for u, i in zip(units, chosen, strict=True))
    assert sum(u.weight[i] for u, i in zip(units, chosen, strict=True)) <= room
    prices = np.geomspace(1e-10, 1e-6, 400)
    bound = max(sum((u.cost + p * u.weight).min() for u in units) - p * room for p in prices)
    assert bound <= total <= bound * 1.001


def test_a_front_that_grows_too_large_is_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cost is what weight is not, so that every subset is a state: still full, and in time."""
    monkeypatch.setattr(knapsack_module, "_MOST", 500)
    g = np.random.default_rng(2)
    weights = [np.sort(g.integers(1, 10**7, 3)).astype(float) for _ in range(40)]
    room = sum(float(w.mean()) for w in weights)
    chosen = knapsack([Options(1e7 - w, w) for w in weights], room)
    used = sum(w[i] for w, i in zip(weights, chosen, strict=True))
    assert 0.9999 * room < used <= room


def test_widths_and_several_layers_of_one_unit() -> None:
    rows = [
        Candidate("ffn", {"up": "q4_0", "down": "q4_k"}, 0.2, {"bytes": 50.0}, width=64),
        Candidate("ffn", {"up": "keep", "down": "keep"}, 0.0, {"bytes": 200.0}, width=96),
        Candidate("head", {"head": "q8_0"}, 0.1, {"bytes": 20.0}),
    ]
    plan = allocate(rows, 80, fixed=5)
    assert plan.specs == {"up": "q4_0", "down": "q4_k", "head": "q8_0"}
    assert plan.widths == {"ffn": 64}
    assert plan.predicted == {"nats": pytest.approx(0.3), "bytes": 75.0}


def test_uniform_is_one_format_or_the_next_larger_one() -> None:
    bits = {"q2": 25, "q4": 45, "q6": 65, "q8": 85}
    rows = [
        Candidate(name, {name: f"{fmt}@gptq"}, size * 4.0 ** -(b / 10), {"bytes": size * b / 8})
        for name, size in (("big", 800), ("narrow", 80))
        for fmt, b in bits.items()
        if name == "big" or fmt in ("q4", "q8")  # rows of `narrow` fit two formats only
    ]
    plans = uniform(rows, 10**9)
    found = {p.specs["big"]: p.specs["narrow"] for p in plans}
    assert found == {
        "q2@gptq": "q4@gptq", "q4@gptq": "q4@gptq", "q6@gptq": "q8@gptq", "q8@gptq": "q8@gptq",
    }  # fmt: skip
    losses = [p.predicted["nats"] for p in plans]
    assert losses == sorted(losses)
    limit = 800 * 65 // 8 + 85 * 10
    assert [p.specs["big"] for p in uniform(rows, limit)] == ["q6@gptq", "q4@gptq", "q2@gptq"]
    assert uniform(rows, limit - 1)[0].specs["big"] == "q4@gptq"
    assert uniform(rows, limit, fixed=1)[0].specs["big"] == "q4@gptq"
    assert uniform(rows, 10) == []
