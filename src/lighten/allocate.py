"""Candidates x budget -> Plan: one candidate per unit, the least sum of errors within the bytes.

Errors of units are taken to add up, so this is a multiple-choice knapsack, solved to the optimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np

from lighten.errors import ImpossibleBudget
from lighten.knapsack import Options, knapsack
from lighten.types import Candidate, Plan


def allocate(candidates: Sequence[Candidate], limit: int, fixed: int = 0) -> Plan:
    """The plan with the least total error whose bytes, `fixed` ones included, are <= limit.

    Raises ImpossibleBudget (saying the smallest possible) where even the smallest do not fit.
    """
    units = _units(candidates)
    room = limit - fixed
    least = sum(min(_bytes(c) for c in unit) for unit in units)
    if least > room:
        raise ImpossibleBudget(
            f"{_size(limit)} cannot be met: the smallest file that the candidates make"
            f" has {_size(least + fixed)} ({_size(fixed)} of it are not weights)",
            f"ask for {_enough(least + fixed)} or more, or prune the model first",
        )
    return assemble(_solve(units, _error, _bytes, room), fixed)


def allocate_error(candidates: Sequence[Candidate], error: float, fixed: int = 0) -> Plan:
    """The smallest plan whose predicted total error is <= `error` nats."""
    units = _units(candidates)
    least = sum(min(c.error for c in unit) for unit in units)
    if least > error:
        raise ImpossibleBudget(
            f"no candidates lose as little as {error:g} nats; the best are predicted {least:g}",
            "allow a larger --max-kld",
        )
    return assemble(_solve(units, _bytes, _error, error), fixed)


def assemble(chosen: Iterable[Candidate], fixed: int = 0) -> Plan:
    """The plan that a choice of candidates is, with what they are predicted to cost."""
    specs: dict[str, str] = {}
    widths: dict[str, int] = {}
    error, size = 0.0, float(fixed)
    for c in chosen:
        specs |= c.specs
        if c.width is not None:
            widths[c.unit] = c.width
        error += c.error
        size += _bytes(c)
    return Plan(specs, widths, {"nats": error, "bytes": size})


def uniform(candidates: Sequence[Candidate], limit: int, fixed: int = 0) -> list[Plan]:
    """The plain baselines that fit: one format everywhere, or the next larger one that is possible.

    Best predicted first. These are what a person would choose without measuring anything.
    """
    by_unit = _by_unit(candidates)
    plans = {}
    for name in sorted({_format(c) for c in candidates if len(c.specs) == 1}):
        chosen = []
        for unit in by_unit:
            same = [c for c in unit if _format(c) == name]
            chosen.append(same[0] if same else _stand_in(unit, candidates, name))
        plan = assemble(chosen, fixed)
        if plan.predicted["bytes"] <= limit:
            plans[name] = plan
    return sorted(plans.values(), key=lambda p: p.predicted["nats"])


def _stand_in(unit: Sequence[Candidate], candidates: Sequence[Candidate], name: str) -> Candidate:
    """The smallest candidate with at least as many bits as `name` has elsewhere."""
    bits = _bits(candidates)
    enough = [c for c in unit if bits[_format(c)] >= bits[name]]
    return min(enough or unit, key=_bytes)


def _bits(candidates: Sequence[Candidate]) -> Mapping[str, float]:
    """Format -> its bytes relative to the largest candidate of the same unit (a rank, not bits)."""
    largest = {u[0].unit: max(_bytes(c) for c in u) for u in _by_unit(candidates)}
    ranks: dict[str, float] = {}
    for c in candidates:
        ranks.setdefault(_format(c), _bytes(c) / largest[c.unit])
    return ranks


def _units(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Candidates by unit, without those that another beats in both error and bytes."""
    return [_frontier(unit) for unit in _by_unit(candidates)]


def _by_unit(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    ordered = sorted(candidates, key=lambda c: c.unit)
    return [list(group) for _, group in groupby(ordered, key=lambda c: c.unit)]


def _frontier(unit: list[Candidate]) -> list[Candidate]:
    kept: list[Candidate] = []
    for c in sorted(unit, key=lambda c: (_bytes(c), c.error)):
        if not kept or c.error < kept[-1].error:
            kept.append(c)
    return kept


def _solve(
    units: Sequence[Sequence[Candidate]],
    cost: Callable[[Candidate], float],
    weight: Callable[[Candidate], float],
    room: float,
) -> list[Candidate]:
    """Least total cost, one of each unit, total weight <= room."""
    options = [
        Options(np.array([cost(c) for c in unit]), np.array([weight(c) for c in unit]))
        for unit in units
    ]
    return [unit[i] for unit, i in zip(units, knapsack(options, room), strict=True)]


def _error(candidate: Candidate) -> float:
    return candidate.error


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.2f} MB" if abs(nbytes) >= 1e7 else f"{nbytes / 1e3:,.1f} kB"


def _enough(nbytes: float) -> str:
    """The size rounded up, as a budget is written."""
    if nbytes >= 1e7:
        return f"{math.ceil(nbytes / 1e5) / 10}MB"
    return f"{math.ceil(nbytes / 100) / 10}kB"


def _bytes(candidate: Candidate) -> float:
    return candidate.cost["bytes"]


def _format(candidate: Candidate) -> str:
    (spec,) = candidate.specs.values()
    return spec.partition("@")[0]
