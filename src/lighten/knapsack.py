"""The multiple-choice knapsack, solved to the optimum: one option of each unit, least total cost.

With a price on weight, the Lagrangian bound says how far any choice is from the best possible: by
the sum of its options' reduced costs, plus the price of the room that it leaves. So only choices
whose reduced costs add up to less than the gap have to be looked at; they are, unit by unit, as a
Pareto front of (weight, cost). The gap is tried small first: a solution inside it is proven best.

*Source:* Kellerer, Pferschy and Pisinger 2004, "Knapsack Problems", chapter 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_MOST = 20_000
"""States of a front; a larger one is thinned evenly, and the result is the best of what is left."""


@dataclass(frozen=True)
class Options:
    """The options of one unit: cost and weight (options,), none as cheap and light as another."""

    cost: Array
    weight: Array


@dataclass(frozen=True)
class _Priced:
    """A price on weight, and each option's cost at that price beyond its unit's least."""

    price: float
    reduced: list[Array]
    bound: float


def knapsack(units: Sequence[Options], room: float) -> list[int]:
    """Which option of each unit; total weight <= room, as the lightest options must fit."""
    chosen, price = _greedy(units, room)
    if price == 0:  # the cheapest of everything fits
        return chosen
    at_price = [u.cost + price * u.weight for u in units]
    bound = float(sum(a.min() for a in at_price)) - price * room
    priced = _Priced(price, [a - a.min() for a in at_price], bound)
    best = _total(units, chosen)
    slack = (best - bound) / 64
    while best - bound > 1e-12 * abs(best):
        slack = min(slack, best - bound)
        found = _within(units, priced, room, slack)
        if found is not None and _total(units, found) < best:
            chosen, best = found, _total(units, found)
        if slack >= best - bound:
            break
        slack *= 4
    return chosen


def _total(units: Sequence[Options], chosen: Sequence[int]) -> float:
    return float(sum(u.cost[i] for u, i in zip(units, chosen, strict=True)))


def _greedy(units: Sequence[Options], room: float) -> tuple[list[int], float]:
    """A good choice, and the price at which its first refused step would be made (0: none was)."""
    chosen = [int(u.weight.argmin()) for u in units]
    steps = sorted(
        (
            step
            for i, (u, at) in enumerate(zip(units, chosen, strict=True))
            for step in _hull(i, u, at)
        ),
        reverse=True,
    )
    used = float(sum(u.weight[i] for u, i in zip(units, chosen, strict=True)))
    price = 0.0
    for gain, unit, before, after in steps:
        more = float(units[unit].weight[after] - units[unit].weight[before])
        if chosen[unit] == before and used + more <= room:
            chosen[unit] = after
            used += more
        else:
            price = price or gain
    return chosen, price


def _hull(unit: int, options: Options, start: int) -> list[tuple[float, int, int, int]]:
    """(cost saved per weight, unit, from, to) along the lower convex hull."""
    steps: list[tuple[float, int, int, int]] = []
    here = start
    while True:
        saved = options.cost[here] - options.cost
        more = options.weight - options.weight[here]
        cheaper = np.flatnonzero((saved > 0) & (more > 0))
        if not len(cheaper):
            return steps
        rate = saved[cheaper] / more[cheaper]
        there = int(cheaper[np.lexsort((-more[cheaper], -rate))[0]])
        steps.append((float(rate.max()), unit, here, there))
        here = there


def _within(
    units: Sequence[Options], priced: _Priced, room: float, slack: float
) -> list[int] | None:
    """The best of the choices whose reduced costs add up to no more than slack, if there is one."""
    slack *= 1 + 1e-9
    kept = [np.flatnonzero(r <= slack) for r in priced.reduced]
    order = sorted(range(len(units)), key=lambda u: len(kept[u]))
    lightest = _still([units[u].weight[kept[u]].min() for u in order])
    heaviest = _still([units[u].weight[kept[u]].max() for u in order])
    least = room - slack / priced.price - 1e-9 * abs(room)
    weight, reduced = np.zeros(1), np.zeros(1)
    trail = []
    for u, light, heavy in zip(order, lightest, heaviest, strict=True):
        options = kept[u]
        w = (weight[:, None] + units[u].weight[options]).ravel()
        r = (reduced[:, None] + priced.reduced[u][options]).ravel()
        state = np.flatnonzero((r <= slack) & (w + light <= room) & (w + heavy >= least))
        if not len(state):
            return None
        state = state[_front(w[state], r[state] - priced.price * w[state])]
        weight, reduced = w[state], r[state]
        trail.append((u, state // len(options), options[state % len(options)]))
    at = int((reduced - priced.price * weight).argmin())
    chosen = [0] * len(units)
    for u, parents, picks in reversed(trail):
        chosen[u], at = int(picks[at]), int(parents[at])
    return chosen


def _still(values: Sequence[float]) -> Array:
    """For each, the sum of those after it."""
    return np.append(np.cumsum(np.asarray(values[:0:-1]))[::-1], 0.0)


def _front(weight: Array, cost: Array) -> NDArray[np.intp]:
    """Indices of the states that no other beats in both, by weight."""
    order = np.lexsort((cost, weight))
    sorted_cost = cost[order]
    best = np.ones(len(order), dtype=bool)
    best[1:] = sorted_cost[1:] < np.minimum.accumulate(sorted_cost)[:-1]
    front = order[best]
    if len(front) > _MOST:
        front = front[np.linspace(0, len(front) - 1, _MOST).astype(np.intp)]
    return front
