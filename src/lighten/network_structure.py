"""The stage of a run that narrows a network: several ways to a budget, the best one taken."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Any

from torch import Tensor

from lighten import network_cost, network_results
from lighten.batchnorms import NORMS, Norms, better_norms
from lighten.compensate import compensate
from lighten.coupling import Couplings, couple
from lighten.curves import curves
from lighten.errors import ImpossibleBudget
from lighten.job import Job, quality, reserving, roughly
from lighten.network import Network
from lighten.progress import note, stage
from lighten.shrink import shrink
from lighten.structure import Spend, free, narrow
from lighten.types import Axis, Budget, Plan
from lighten.widths import Curve, branches, keep_of, spend, uniform


def structure(
    job: Job, limit: Budget | None, before: Mapping[str, Any]
) -> tuple[Network, Plan, list[dict[str, Any]]]:
    """The network at the widths that meet the budget; the plain choice is measured beside."""
    if limit is None:
        return job.network, Plan({}), []
    room = limit.amount(network_cost.now(limit, before))
    with stage("couple channels"):
        couplings = couple(job.network)
    job = reserving(job, couplings)
    for name, nodes in couplings.unknown.items():
        note(f"operator {name} has no rule: what it touches keeps its width ({len(nodes)} places)")
    spent = network_cost.spend(
        job.network, couplings.free, limit, job.bits[0] if job.bits else 32,
        lambda network, path: job.exporter.write(roughly(job, network), path),
        job.run.folder / "latencies.json", job.beside(before),
    )  # fmt: skip
    # stored, for a time that is taken again may be on the other side of the budget
    whole = job.run.json(f"{job.within}measured/whole", lambda: {"cost": spent.actual(job.network)})
    if whole["cost"] <= room:
        note("the budget is met with no channel removed")
        return job.network, Plan({}), []
    found = axis_curves(job, couplings)
    axes = free(couplings.axes, found)
    streams = {a.name for a in axes} - {a.name for a in branches(axes)}
    ways = {"allocated": partial(spend, held=()), "uniform": partial(uniform, held=streams)}
    if 0 < len(streams) < len(axes):
        ways = {"branches": partial(spend, held=streams), **ways}
    made: dict[str, Shrunk] = {}
    for name, way in ways.items():
        try:
            widths = _widths(job, couplings, found, spent, room, axes, name, way)
        except ImpossibleBudget as error:
            raise ImpossibleBudget(
                f"budget in {limit.unit}: {error.message}", error.hint, error.least
            ) from error
        if widths is None:
            continue
        same = next((shrunk for shrunk in made.values() if shrunk.widths == widths), None)
        made[name] = same or at_widths(job, couplings, found, widths, name)
    best = max(made, key=lambda name: network_results.score(made[name].quality))
    rows = [
        {"plan": name, "chosen": "yes" if name == best else "", **shrunk.quality}
        for name, shrunk in made.items()
    ]
    return made[best].network, Plan({}, made[best].widths), rows


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A narrower network, compensated and measured."""

    network: Network
    widths: dict[str, int]
    quality: dict[str, Any]


def _widths(
    job: Job, couplings: Couplings, found: Mapping[str, Curve], spent: Spend, room: float,
    axes: list[Axis], name: str, way: Callable[..., dict[str, int]],
) -> dict[str, int] | None:  # fmt: skip
    """Widths that meet the budget, chosen one way; stored. None where a plain way does not come
    under it, stored too: a time that is taken again could be on the other side."""

    def work() -> dict[str, int] | None:
        with stage(f"choose widths ({name})"):
            try:
                met = narrow(
                    job.network, couplings, found, spent, room,
                    lambda limit: way(axes, found, spent.terms, limit, spent.fixed, job.multiple),
                )  # fmt: skip
            except ImpossibleBudget:
                if name == "allocated":
                    raise
                return None
            return dict(met.widths)

    stored = job.run.json(f"{job.within}widths/{name}", work)
    return None if stored is None else {str(k): int(v) for k, v in stored.items()}


def at_widths(
    job: Job, couplings: Couplings, found: Mapping[str, Curve], widths: dict[str, int], name: str
) -> Shrunk:
    """The network at these widths, compensated and measured; stored by the widths, for two ways
    often find the same."""
    key = sha256(json.dumps(widths, sort_keys=True).encode()).hexdigest()[:10]
    keep = keep_of(found, widths)
    small = shrink(job.network, couplings, keep)

    def compensated() -> Mapping[str, Tensor]:
        data = job.samples.calibration
        with stage(f"compensate ({name})", len(job.network.layers), "weights") as tick:
            better = compensate(job.network, small, couplings, keep, data, tick=tick)
        with stage(f"batch norms ({name})"):
            norms = better_norms(job.network, better, data)
        return {NORMS: norms.as_tensor(), **norms.network.module.state_dict()}

    stored = job.run.tensors(f"shrunk/{key}", compensated, given=widths)
    norms = Norms.of_tensor(stored.pop(NORMS), small)
    small.module.load_state_dict(stored)

    def measured() -> dict[str, Any]:
        with stage(f"measure ({name})"):
            return {**network_cost.sizes(small), **quality(job, small)}

    facts = job.run.json(f"measured/{key}", measured, given=widths)
    if norms.said:
        small = replace(small, notes=(*small.notes, norms.said))
    return Shrunk(small, widths, facts)


def axis_curves(job: Job, couplings: Couplings) -> dict[str, Curve]:
    """What every free axis loses at every width; stored."""

    def work() -> Mapping[str, Tensor]:
        with stage("sensitivity of axes", len(couplings.free), "axes") as tick:
            found = curves(job.network, couplings, job.samples.calibration, tick=tick)
        parts = {}
        for name, curve in found.items():
            parts[f"{name}/order"], parts[f"{name}/error"] = curve.order, curve.error
        return parts

    return read_curves(job.run.tensors("curves", work))


def read_curves(parts: Mapping[str, Tensor]) -> dict[str, Curve]:
    """Axis -> its curve, as `axis_curves` stores them."""
    names = dict.fromkeys(key.rpartition("/")[0] for key in parts)
    return {n: Curve(parts[f"{n}/order"], parts[f"{n}/error"]) for n in names}
