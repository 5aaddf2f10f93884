"""Decisions x budget: how wide each axis, which format each layer, where costs multiply.

A convolution between two axes costs width x width, so costs of decisions do not add up. At a price
on cost, each decision in turn takes its best option while the others stand, until none moves; the
price is bisected until the limit is met, and what room is left buys the best single steps. Where no
part of the cost depends on two decisions this is a knapsack, and it is solved to the optimum.

An error too may depend on several decisions: a tensor that two layers share is rounded if either of
them computes with integers. Those decisions are then also moved together, since to move one alone
saves nothing.

*Source:* Everett 1963, "Generalized Lagrange multiplier method for solving problems of optimum
allocation of resources" (the price); lighten.knapsack for the separable case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lighten.errors import ImpossibleBudget
from lighten.knapsack import Options, knapsack

_BISECTIONS = 48
_ROUNDS = 12

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Decision:
    """One thing to decide. values: the options, such as widths; errors: what each loses."""

    name: str
    values: tuple[Any, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Term:
    """A part of the cost or of the error, and the decisions that it depends on."""

    names: tuple[str, ...]
    cost: Callable[[Values], float]


def decide(
    decisions: Sequence[Decision],
    terms: Sequence[Term],
    limit: float,
    fixed: float = 0.0,
    losses: Sequence[Term] = (),
) -> dict[str, Any]:
    """The value of each decision: the least total error found whose total cost is <= limit.

    losses: errors that depend on several decisions, beside those of the decisions themselves.
    Raises ImpossibleBudget where even the cheapest values are above it; its `message` has no unit.
    """
    problem = _Problem(decisions, terms, fixed, losses)
    cheapest = problem.cheapest
    least = problem.cost(cheapest)
    if least > limit:
        raise ImpossibleBudget(
            f"{limit:,.4g} cannot be met: the least that is possible is {least:,.4g}",
            "allow more",
            least,
        )
    if problem.separable:
        return problem.named(problem.exact(limit))
    best = problem.at_price(0.0)
    if problem.cost(best) <= limit:
        return problem.named(best)
    low, high, best = 0.0, problem.top_price(), cheapest
    for _ in range(_BISECTIONS):
        price = (low * high) ** 0.5 if low else high / 1024
        found = problem.at_price(price)
        if problem.cost(found) <= limit:
            high = price
            if problem.error(found) < problem.error(best):
                best = found
        else:
            low = price
        if low and high / low < 1.0001:
            break
    return problem.named(problem.fill(best, limit))


class _Problem:
    """Options by index: a choice is one index per decision."""

    def __init__(
        self,
        decisions: Sequence[Decision],
        terms: Sequence[Term],
        fixed: float,
        losses: Sequence[Term] = (),
    ) -> None:
        self.decisions = decisions
        self.errors = [np.asarray(d.errors, dtype=np.float64) for d in decisions]
        at = {d.name: i for i, d in enumerate(decisions)}
        own = [tuple(at[n] for n in t.names if n in at) for t in terms]
        self.terms, self.own = terms, own
        self.touching = [[t for t, who in enumerate(own) if i in who] for i in range(len(at))]
        self.separable = not losses and all(len(who) <= 1 for who in own)
        self.base = fixed
        lost = [[at[n] for n in t.names if n in at] for t in losses]
        self.losses = losses
        self.hurting = [[t for t, who in enumerate(lost) if i in who] for i in range(len(at))]
        self.groups = [list(who) for who in dict.fromkeys(tuple(sorted(w)) for w in lost)]

    def named(self, chosen: Sequence[int]) -> dict[str, Any]:
        return {d.name: d.values[i] for d, i in zip(self.decisions, chosen, strict=True)}

    def cost(self, chosen: Sequence[int]) -> float:
        values = self.named(chosen)
        return self.base + sum(t.cost(values) for t in self.terms)

    def error(self, chosen: Sequence[int]) -> float:
        own = float(sum(e[i] for e, i in zip(self.errors, chosen, strict=True)))
        if not self.losses:
            return own
        values = self.named(chosen)
        return own + sum(t.cost(values) for t in self.losses)

    def lost(self, decision: int, chosen: Sequence[int]) -> np.ndarray[Any, Any]:
        """What one decision loses at each of its options, the others as chosen."""
        if not self.hurting[decision]:
            return self.errors[decision]
        shared = [self.losses[t] for t in self.hurting[decision]]
        found: np.ndarray[Any, Any] = self._each(decision, chosen, shared) + self.errors[decision]
        return found

    def costs(self, decision: int, chosen: Sequence[int]) -> np.ndarray[Any, Any]:
        """What the terms of one decision cost at each of its options, the others as chosen."""
        return self._each(decision, chosen, [self.terms[t] for t in self.touching[decision]])

    def _each(
        self, decision: int, chosen: Sequence[int], terms: Sequence[Term]
    ) -> np.ndarray[Any, Any]:
        values = self.named(chosen)
        name = self.decisions[decision].name
        found = []
        for value in self.decisions[decision].values:
            values[name] = value
            found.append(sum(t.cost(values) for t in terms))
        return np.asarray(found, dtype=np.float64)

    def at_price(self, price: float) -> list[int]:
        """The choice where no single decision gains, begun with the least error; where decisions
        share a loss, also begun with the least cost and moved together, the better of the two."""
        best = self._settled([int(e.argmin()) for e in self.errors], price)
        if not self.losses:
            return best
        if np.isinf(price):
            other = self._settled([int(e.argmax()) for e in self.errors], price)
            return min(best, other, key=self.cost)
        starts = [best, self._settled(self.cheapest, price)]
        moved = [self._together(start, price) for start in starts]
        return min(moved, key=lambda chosen: self.error(chosen) + price * self.cost(chosen))

    @cached_property
    def cheapest(self) -> list[int]:
        return self.at_price(np.inf)

    def _together(self, chosen: list[int], price: float) -> list[int]:
        """Decisions of a loss set to one value at once, where that gains; then singly again."""
        here = self.error(chosen) + price * self.cost(chosen)
        for _ in range(_ROUNDS):
            gained = False
            for group in self.groups:
                every = [self.decisions[i].values for i in group]
                for value in [v for v in every[0] if all(v in other for other in every)]:
                    tried = list(chosen)
                    for i, values in zip(group, every, strict=True):
                        tried[i] = values.index(value)
                    there = self.error(tried) + price * self.cost(tried)
                    if there < here * (1 - 1e-12):
                        chosen, here, gained = tried, there, True
            if not gained:
                break
            chosen = self._settled(chosen, price)
            here = self.error(chosen) + price * self.cost(chosen)
        return chosen

    def _settled(self, chosen: list[int], price: float) -> list[int]:
        chosen = list(chosen)
        for _ in range(_ROUNDS):
            before = list(chosen)
            for i in range(len(self.errors)):
                errors, costs = self.lost(i, chosen), self.costs(i, chosen)
                if np.isinf(price):
                    order = np.lexsort((errors, costs))
                else:
                    order = np.lexsort((costs, errors + price * costs))
                chosen[i] = int(order[0])
            if chosen == before:
                break
        return chosen

    def top_price(self) -> float:
        """A price at which every decision takes its cheapest option."""
        chosen = [int(e.argmin()) for e in self.errors]
        price = 1e-300
        for i in range(len(self.errors)):
            errors, costs = self.lost(i, chosen), self.costs(i, chosen)
            gaps = np.diff(np.unique(costs))
            if len(gaps):
                price = max(price, float(np.ptp(errors) / gaps.min()))
        return price * 1024

    def exact(self, limit: float) -> list[int]:
        """The optimum of the separable problem."""
        chosen = [int(e.argmin()) for e in self.errors]
        costs = [self.costs(i, chosen) for i in range(len(self.decisions))]
        idle = sum(t.cost({}) for t, who in zip(self.terms, self.own, strict=True) if not who)
        kept = [_frontier(e, c) for e, c in zip(self.errors, costs, strict=True)]
        options = [Options(e[k], c[k]) for e, c, k in zip(self.errors, costs, kept, strict=True)]
        picks = knapsack(options, limit - self.base - idle)
        return [int(k[p]) for k, p in zip(kept, picks, strict=True)]

    def fill(self, chosen: list[int], limit: float) -> list[int]:
        """Single steps that still fit, the one that saves most error per cost first."""
        chosen = list(chosen)
        room = limit - self.cost(chosen)
        while True:
            best, step = 0.0, None
            for i in range(len(self.errors)):
                errors, costs = self.lost(i, chosen), self.costs(i, chosen)
                more = costs - costs[chosen[i]]
                saved = errors[chosen[i]] - errors
                fits = np.flatnonzero((saved > 0) & (more <= room))
                for option in fits:
                    rate = saved[option] / max(more[option], 1e-12)
                    if rate > best:
                        best, step = float(rate), (i, int(option), float(more[option]))
            if step is None:
                return chosen
            chosen[step[0]] = step[1]
            room -= step[2]


def _frontier(errors: np.ndarray[Any, Any], costs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Indices of the options that no other beats in both error and cost."""
    order = np.lexsort((errors, costs))
    best = np.ones(len(order), dtype=bool)
    best[1:] = errors[order][1:] < np.minimum.accumulate(errors[order])[:-1]
    return np.asarray(order[best])
