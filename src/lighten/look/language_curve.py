"""The trade-off curve of a language model: what other sizes would lose.

Plans for other budgets come from the stored candidates and are predicted; those that the run
assembled were measured. First-order predictions are off by a factor that changes little from plan
to plan, so they are multiplied by what was measured over what was predicted of this run's plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lighten import allocate as knapsack
from lighten.errors import ImpossibleBudget
from lighten.types import Candidate, Plan

BUDGETS = 12

_QUALITY = ("mean_kld", "p99_kld", "top1_agreement", "perplexity")


def curve(
    rows: Sequence[Candidate],
    fixed: int,
    measured: Mapping[str, tuple[Plan, Mapping[str, Any]]],
    metrics: Mapping[str, Any],
    tick: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Points: the original, this plan, others that were measured, other budgets, uniform formats.

    fixed: bytes that depend on no plan. measured: name -> the plan and its Quality.as_dict().
    metrics: of the run, whose `plan` says which it took.
    """
    before, after = metrics["before"], metrics["after"]
    points: list[dict[str, Any]] = [
        {"plan": "original", "source": "original", "measured": True, "bytes": before["bytes"],
         "perplexity": before["perplexity"], "mean_kld": 0.0, "p99_kld": 0.0,
         "top1_agreement": 1.0},
        {"plan": metrics["plan"], "source": "this plan", "measured": True,
         "bytes": after["bytes"], **_of(after)},
    ]  # fmt: skip
    for name, (plan, found) in measured.items():
        if name != metrics["plan"] and _of(found) != _of(after):
            kind = "uniform" if name == "uniform" else "other budget"
            points.append(
                {"plan": name, "source": kind, "measured": True,
                 "bytes": int(plan.predicted["bytes"]), **_of(found)}
            )  # fmt: skip
    factor = trust(measured.values())
    for plan in other_budgets(rows, fixed, tick):
        points.append(_predicted(f"{plan.predicted['bytes'] / 1e6:.3g} MB", plan, factor))
    known = [plan.specs for plan, _ in measured.values()]
    for name, plan in _uniform(rows, fixed).items():
        if plan.specs not in known:
            points.append(_predicted(name, plan, factor) | {"source": "uniform"})
    return points


def trust(measured: Any) -> float:
    """What was measured over what was predicted, of the plan that lost least; 1 if unknown."""
    pairs = [(found["mean_kld"], plan.predicted.get("nats", 0.0)) for plan, found in measured]
    values = [(_value(lost), nats) for lost, nats in pairs if nats > 0 and _value(lost) > 0]
    return min(values)[0] / min(values)[1] if values else 1.0


def other_budgets(
    rows: Sequence[Candidate], fixed: int, tick: Callable[[], None] = lambda: None
) -> list[Plan]:
    """Plans from the smallest possible file to everything kept, evenly in the logarithm."""
    low, high = ends(rows, fixed)
    found: dict[float, Plan] = {}
    for turn in range(BUDGETS):
        limit = low if high <= low else round(low * (high / low) ** (turn / (BUDGETS - 1)))
        try:
            plan = knapsack.allocate(rows, limit, fixed)
        except ImpossibleBudget:  # a budget that is met to the byte, rounded down
            continue
        found.setdefault(plan.predicted["bytes"], plan)
        tick()
    return [found[size] for size in sorted(found)]


def ends(rows: Sequence[Candidate], fixed: int) -> tuple[int, int]:
    """Bytes of the smallest file that is possible, and of one with everything kept."""
    smallest: dict[str, float] = {}
    kept: dict[str, float] = {}
    for c in rows:
        size = c.cost["bytes"]
        smallest[c.unit] = min(size, smallest.get(c.unit, size))
        if set(c.specs.values()) == {"keep"}:
            kept[c.unit] = size
    high = sum(kept.get(unit, size) for unit, size in smallest.items())
    return fixed + int(sum(smallest.values())), fixed + int(high)


def _predicted(name: str, plan: Plan, factor: float) -> dict[str, Any]:
    nats = plan.predicted["nats"]
    return {
        "plan": name, "source": "other budget", "measured": False,
        "bytes": int(plan.predicted["bytes"]), "mean_kld": nats * factor, "predicted_kld": nats,
    }  # fmt: skip


def _uniform(rows: Sequence[Candidate], fixed: int) -> dict[str, Plan]:
    """Format -> the best plan in which most layers have it, no larger than everything kept.

    Where rows do not fit a format's blocks, others stand in, and two wishes may be nearly one plan.
    """
    found: dict[str, Plan] = {}
    for plan in knapsack.uniform(rows, ends(rows, fixed)[1], fixed):  # best first
        found.setdefault(_most(plan), plan)
    found.pop("keep", None)
    return found


def _most(plan: Plan) -> str:
    """The format that most layers have."""
    names = [spec.partition("@")[0] for spec in plan.specs.values()]
    return max(sorted(set(names)), key=names.count)


def _of(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in _QUALITY if key in found}


def _value(quantity: Any) -> float:
    return float(quantity["value"] if isinstance(quantity, Mapping) else quantity)
