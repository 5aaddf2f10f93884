"""The trade-off curve of a network: what was measured, and what other budgets would lose.

Widths for other budgets come from the stored curves of the axes and are predicted: their MACs are
counted, what they lose is the sum of the curves, times what was measured over what was predicted of
this run's plan (that factor changes little from plan to plan).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lighten import network_cost
from lighten.errors import ImpossibleBudget
from lighten.network import Network
from lighten.types import Axis, Plan
from lighten.widths import Curve, spend, uniform

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Of the MACs that axes touch, from all of them down: budgets that are looked at."""

MOST_NATS = 2.0
"""Beyond that a sum of first-order losses says nothing."""

_COSTS = ("bytes", "macs", "parameters", "p50_ms")
_QUALITY = (
    "accuracy", "evaluate", "mean_kld", "p99_kld", "top1_agreement", "sqnr_db", "relative_error",
)  # fmt: skip
_ALIKE = {"mean_kld": 0.0, "p99_kld": 0.0, "top1_agreement": 1.0, "relative_error": 0.0}
"""What the original has beside itself."""

_SINGLE = ("uniform", "int8", "w4a8", "w8", "w4")
"""Plans with one setting for all layers."""


def curve(
    metrics: Mapping[str, Any],
    plan: Plan,
    others: Sequence[Mapping[str, Any]] = (),
    factor: float = 1.0,
) -> list[dict[str, Any]]:
    """Points: the original, this plan, the others that the run measured, and predicted ones.

    metrics: of the run. others: see `other_budgets`. factor: see `trust`.
    """
    before, after = metrics["before"], metrics["after"]
    chosen = str(metrics.get("plan") or "")
    alike = {key: value for key, value in _ALIKE.items() if key in after}
    points = [
        {"plan": "original", "source": "original", "measured": True, **alike, **_of(before)},
        {"plan": chosen or _called(plan), "source": "this plan", "measured": True, **_of(after)},
    ]
    for row in metrics.get("plans") or ():
        if row.get("chosen") or _same(row, points):
            continue
        kind = "uniform" if row["plan"] in _SINGLE else "other budget"
        points.append({"plan": row["plan"], "source": kind, "measured": True, **_of(row)})
    each = float(after["bytes"]) / float(after["parameters"])
    for row in others:
        lost = {"predicted_kld": row["predicted_kld"]}
        if "mean_kld" in after:
            lost["mean_kld"] = factor * row["predicted_kld"]
            if lost["mean_kld"] > MOST_NATS:
                continue
        points.append(
            {"plan": row["plan"], "source": row["source"], "measured": False,
             "macs": row["macs"], "parameters": row["parameters"],
             "bytes": round(each * row["parameters"]), **lost}
        )  # fmt: skip
    return points


def trust(metrics: Mapping[str, Any], predicted: float) -> float:
    """What was measured of the plan, before anything was learned, over the nats predicted of it."""
    row = next((row for row in metrics.get("plans") or () if row.get("chosen")), None)
    measured = None if row is None else _value(row.get("mean_kld"))
    return measured / predicted if measured and predicted > 0 else 1.0


def nats(curves: Mapping[str, Curve], widths: Mapping[str, int]) -> float:
    """The sum of what every axis alone is predicted to lose."""
    return float(sum(curves[n].error[w] for n, w in widths.items() if w < len(curves[n].order)))


def other_budgets(
    network: Network,
    axes: Sequence[Axis],
    curves: Mapping[str, Curve],
    multiple: int = 1,
    tick: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Widths for budgets of MACs, allocated and uniform: {"plan", "source", "macs", "parameters",
    "predicted_kld"}."""
    found = []
    for source, row in _predicted(network, axes, curves, multiple):
        tick()
        if row is not None:
            found.append({**row, "source": source})
    return found


def _predicted(
    network: Network, axes: Sequence[Axis], curves: Mapping[str, Curve], multiple: int
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    costs = {unit: network_cost.counted(network, axes, unit) for unit in ("macs", "params")}
    whole = costs["macs"].predicted({axis.name: axis.width for axis in axes})

    seen = set[tuple[tuple[str, int], ...]]()
    for source, way in (("other budget", spend), ("uniform", uniform)):
        for share in SHARES:
            try:
                widths = way(axes, curves, costs["macs"].terms, share * whole,
                             costs["macs"].fixed, multiple)  # fmt: skip
            except ImpossibleBudget:
                yield source, None
                continue
            key = tuple(sorted(widths.items()))
            if key in seen:
                yield source, None
                continue
            seen.add(key)
            cost = costs["macs"].predicted(widths)
            yield (
                source,
                {
                    "plan": f"{cost / whole:.0%} MACs",
                    "macs": round(cost),
                    "parameters": round(costs["params"].predicted(widths)),
                    "predicted_kld": nats(curves, widths),
                },
            )


def _of(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in (*_COSTS, *_QUALITY) if key in found}


def _called(plan: Plan) -> str:
    return "whole" if plan.widths or plan.specs else "this plan"


def _same(row: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a plan measured as one that is there already: two ways often find the same."""
    keys = ("macs", "mean_kld", "accuracy")
    return any(all(p.get(key) == row.get(key) for key in keys) for p in points)


def _value(quantity: Any) -> float | None:
    if isinstance(quantity, Mapping):
        quantity = quantity.get("value")
    return None if quantity is None else float(quantity)
