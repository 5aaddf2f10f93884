"""Which plan is taken: predictions propose, what the assembled model measures decides.

measured(name, plan) -> Quality.as_dict()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lighten import allocate as knapsack
from lighten.errors import BadOutput
from lighten.types import Candidate, Plan

Measured = Callable[[str, Plan], dict[str, Any]]


def best_of(
    rows: Sequence[Candidate], limit: int, fixed: int, measured: Measured
) -> tuple[Plan, dict[str, Any]]:
    """The allocated plan and the best uniform one, both assembled and measured: the better wins.

    limit, fixed: bytes of the file, and those of them that depend on no plan.
    """
    plans = {"allocated": knapsack.allocate(list(rows), limit, fixed)}
    baselines = knapsack.uniform(list(rows), limit, fixed)
    if baselines and baselines[0].specs != plans["allocated"].specs:
        plans["uniform"] = baselines[0]
    found = {name: measured(name, plan) for name, plan in plans.items()}
    best = min(found, key=lambda name: found[name]["mean_kld"]["value"])
    return plans[best], {"chosen": best, **found}


def smallest(
    rows: Sequence[Candidate], max_kld: float, fixed: int, measured: Measured
) -> tuple[Plan, dict[str, Any]]:
    """Search for the smallest plan whose measured loss stays below max_kld; raises BadOutput.

    Predictions are off by a factor that changes little between plans: it is measured and used.
    """
    factor, best = 1.0, None
    for turn in range(5):
        plan = knapsack.allocate_error(list(rows), max_kld / factor, fixed)
        if best is not None and plan.predicted["bytes"] == best[0].predicted["bytes"]:
            break
        found = measured(f"allocated-{turn}", plan)
        value = found["mean_kld"]["value"]
        if value <= max_kld and (
            best is None or plan.predicted["bytes"] < best[0].predicted["bytes"]
        ):
            best = plan, found
        if best is not None and 0.93 * max_kld <= value <= max_kld:
            break
        if value <= 0 or plan.predicted["nats"] <= 0:
            break  # nothing is lost, and so nothing to be learned
        factor = value / plan.predicted["nats"] * (1.02 if value > max_kld else 1.0)
    if best is None:
        raise BadOutput(
            f"no plan that was tried keeps the loss at or below {max_kld:g} nats",
            "allow a larger --max-kld",
        )
    return best[0], {"chosen": "allocated", "allocated": best[1]}
