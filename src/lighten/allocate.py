"""Candidates x budget -> Plan: one candidate per unit, the least sum of errors within the bytes.

Errors of units are taken to add up, so this is a multiple-choice knapsack, solved to the optimum
by the HiGHS solver in scipy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np

from lighten.errors import BadOutput, ImpossibleBudget
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
            f"{limit / 1e6:,.2f} MB cannot be met: the smallest file that the candidates make"
            f" has {(least + fixed) / 1e6:,.2f} MB ({fixed / 1e6:,.2f} MB of it are not weights)",
            f"ask for {(least + fixed) / 1e6:,.1f}MB or more, or prune the model first",
        )
    flat = [c for unit in units for c in unit]
    chosen = _solve(units, [c.error for c in flat], [_bytes(c) for c in flat], room)
    return assemble(chosen, fixed)


def allocate_error(candidates: Sequence[Candidate], error: float, fixed: int = 0) -> Plan:
    """The smallest plan whose predicted total error is <= `error` nats."""
    units = _units(candidates)
    least = sum(min(c.error for c in unit) for unit in units)
    if least > error:
        raise ImpossibleBudget(
            f"no candidates lose as little as {error:g} nats; the best are predicted {least:g}",
            "allow a larger --max-kld",
        )
    flat = [c for unit in units for c in unit]
    chosen = _solve(units, [_bytes(c) for c in flat], [c.error for c in flat], error)
    return assemble(chosen, fixed)


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
    units: list[list[Candidate]], cost: list[float], weight: list[float], room: float
) -> list[Candidate]:
    """Least cost, one of each unit, total weight <= room."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    sizes = [len(unit) for unit in units]
    rows = np.repeat(np.arange(len(units)), sizes)
    one = coo_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), (len(units), len(rows)))
    # both rows in units near 1: HiGHS has absolute tolerances
    scale = max(max(cost), 1e-30) / 1000
    found = milp(
        np.asarray(cost) / scale,
        constraints=[
            LinearConstraint(one.tocsc(), 1, 1),
            LinearConstraint(np.asarray(weight)[None] / room, -np.inf, 1.0),
        ],
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-7, "time_limit": 120},
    )
    if found.x is None:
        raise BadOutput(f"the allocator found no plan: {found.message}", "please report this")
    flat = [c for unit in units for c in unit]
    return [c for c, x in zip(flat, found.x, strict=True) if x > 0.5]


def _bytes(candidate: Candidate) -> float:
    return candidate.cost["bytes"]


def _format(candidate: Candidate) -> str:
    (spec,) = candidate.specs.values()
    return spec.partition("@")[0]
