"""What a run on a network can still give: another budget's widths in seconds, another kind of file.

A run keeps what was asked for beside what it found, so that its network can be opened again. That
cannot be kept of a module in memory: there the same call to lighten.compress has to be made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lighten import front, network_cost
from lighten.atomic import write_text
from lighten.costs import parameter_counts, size_terms
from lighten.coupling import couple
from lighten.decide import Term
from lighten.errors import BadInput, ImpossibleBudget, WrongUse
from lighten.network import Network
from lighten.network_structure import read_curves
from lighten.precision import mixes, precision
from lighten.progress import stage
from lighten.registry import exporters
from lighten.run import Run
from lighten.structure import Spend, free, narrow
from lighten.types import Axis, Budget, Plan
from lighten.widths import spend

ASKED = "asked"
"""The file of a run that says how its network and data are opened again."""

_FILES = ("data", "test", "weights")
_OTHER = ("out", "also")  # where to, which a run knows itself, and what else to write


def storable(asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of lighten.compress as JSON, files by their whole path; None where some of
    them are objects in memory."""
    found = {k: v for k, v in asked.items() if k not in _OTHER and v is not None}
    for name in _FILES:
        if isinstance(found.get(name), str | Path):
            found[name] = os.path.abspath(Path(found[name]).expanduser())
    plain = all(isinstance(v, str | int | float) for v in found.values())
    return found if plain else None


def export(run: str | Path, to: str) -> Path:
    """Write what a finished run made in another form; nothing that is stored is done again.

    Rounding is not stored and takes its time. Raises UserError.
    """
    exporter = exporters[to]
    opened = Run.at(run, lock=False)
    if not opened.whole("metrics.json"):
        raise WrongUse(f"{run} is not finished", "let `lighten compress` finish first")
    asked = _asked(opened)
    network = _network(opened, asked)
    if why := exporter.refuses(network):
        raise WrongUse(f"`{to}` cannot hold this network: {why}")
    return front.compress(**asked, out=run, also=to).exported


def replan(run: str | Path, budget: str) -> dict[str, Any]:
    """What another budget would buy, from the stored curves: nothing is fitted or measured.

    Multiply-adds and parameters are counted; bytes and milliseconds predicted. {"budget",
    "predicted_<quantity>", "predicted_kld", "plan", "widths"}. Raises UserError.
    """
    limit = Budget.parse(budget)
    with Run.at(run) as opened:
        network = _network(opened, _asked(opened))
        if not opened.whole("curves.safetensors"):
            raise WrongUse(
                f"{run} has no curves: no channel was to be removed, or it was stopped before",
                "a run with a budget in macs or params has them",
            )
        found = read_curves(opened.tensors("curves", dict))
        with stage("couple channels"):
            couplings = couple(network)
        axes = free(couplings.axes, found)
        before = opened.json("measured/original", dict)
        network_cost.check(limit, opened.request["export"])
        room = limit.amount(network_cost.now(limit, before))
        multiple = int(opened.request["multiple"])
        spent, exact = _spend(opened, network, axes, limit, before)
        way = partial(spend, axes, found, spent.terms, fixed=spent.fixed, multiple=multiple)
        whole = {axis.name: axis.width for axis in axes}
        try:
            if spent.predicted(whole) <= room:
                widths = whole
            elif exact:
                met = narrow(network, couplings, found, spent, room, lambda cost: way(limit=cost))
                widths = dict(met.widths)
            else:
                widths = way(limit=room)
        except ImpossibleBudget as error:
            message = f"budget in {limit.unit}: {error.message}"
            raise ImpossibleBudget(message, error.hint, error.least) from error
        narrowed = {name: width for name, width in widths.items() if width < whole[name]}
        cost = met.cost if exact and narrowed else spent.predicted(widths)
        nats = float(sum(found[name].error[width] for name, width in narrowed.items()))
        plan = Plan({}, widths, {network_cost.quantity(limit): cost, "nats": nats})
        name = f"plans/{budget.replace('%', 'pc').replace(' ', '')}.json"
        path = opened.file(name, lambda path: write_text(path, plan.to_json()),
                           given=plan.to_json())  # fmt: skip
        return {
            "budget": budget,
            f"predicted_{network_cost.quantity(limit)}": cost,
            "predicted_kld": nats,
            "plan": str(path),
            "widths": [{"axis": n, "units": w, "of": whole[n]} for n, w in widths.items()],
            "notes": _notes(opened, limit),
        }


def _asked(run: Run) -> dict[str, Any]:
    """How the run's network is opened again; raises WrongUse where it cannot be."""
    if "student" in run.request:
        raise WrongUse(
            f"{run.folder} is a run of distill: it has no plan",
            f"lighten.load opens what was learned, {run.path('model')}; lighten.write_onnx writes"
            " it as ONNX",
        )
    if not run.whole(f"{ASKED}.json"):
        raise WrongUse(
            f"{run.folder} was made from a module in memory, which cannot be opened again",
            "call lighten.compress again, with this folder and `also`, or with another budget"
            " and folder",
        )
    try:
        found: dict[str, Any] = json.loads(run.path(f"{ASKED}.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{run.path(ASKED)}.json is damaged: {error}") from error
    return found


def _network(run: Run, asked: Mapping[str, Any]) -> Network:
    """The network that a run was made of; raises WrongUse where another stands in its place."""
    network = front.opened(asked["model"], None, asked.get("weights"), asked.get("size"))
    if network.digest != run.request["model"]:
        raise WrongUse(
            f"{asked['model']} is not the network that {run.folder} was made of: it has changed",
            "put that network and its weights back, or compress this one with another --out",
        )
    return network


def _spend(
    run: Run, network: Network, axes: list[Axis], limit: Budget, before: Mapping[str, Any]
) -> tuple[Spend, bool]:
    """What widths cost, and whether that can be counted and need not be predicted."""
    if limit.unit in ("macs", "params"):
        return network_cost.counted(network, axes, limit.unit), True
    bits = precision(run.request["quantize"], limit)
    stored = bits[0] if bits else 32
    whole = {axis.name: axis.width for axis in axes}

    def predicted(weight_bits: int) -> Spend:
        return network_cost.spend(
            network, axes, limit, weight_bits, lambda *_: None, run.folder / "latencies.json"
        )

    spent = predicted(stored)
    if limit.unit == "ms":  # times of operators leave something out, the same share at any width
        share = before["p50_ms"] / predicted(32).predicted(whole)
        terms = [Term(term.names, partial(_scaled, term, share)) for term in spent.terms]
        return Spend(terms, spent.fixed * share, spent.actual), False
    counts = dict.fromkeys(parameter_counts(network), 4.0)
    numbers, rest = size_terms(network, axes, counts)
    # names, shapes and operators of the file
    frame = before["bytes"] - rest - sum(term.cost(whole) for term in numbers)
    return Spend(spent.terms, spent.fixed + frame, spent.actual), False


def _notes(run: Run, limit: Budget) -> list[str]:
    found = ["the loss is what the curves say of each axis alone, added up: compress measures it"]
    if mixes(run.request["quantize"], limit):
        found.append("8 bits in every layer; compress chooses formats too, and may remove less")
    return found


def _scaled(term: Term, share: float, widths: Mapping[str, Any]) -> float:
    return share * term.cost(widths)
