"""compress() for networks: prune -> compensate -> quantize -> export -> measure, on one screen.

Every stage is stored in the run directory, and so resumes. What a budget is spent in decides what
is done: multiply-adds and parameters by structure alone, bytes and milliseconds by 8-bit integers
first and structure for the rest; `quantize` says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lighten import network_cost, network_results
from lighten.atomic import write_text
from lighten.compensate import compensate
from lighten.coupling import Couplings, couple
from lighten.cpu import saturates
from lighten.curves import curves
from lighten.errors import ImpossibleBudget, WrongUse
from lighten.network import Network
from lighten.network_quality import measure_network, outputs
from lighten.pipeline import Result
from lighten.precision import precision
from lighten.preflight import preflight
from lighten.progress import note, stage
from lighten.quantize_network import quantize as quantize_network
from lighten.quantized import Quantized
from lighten.registry import exporters
from lighten.run import Run, default_folder
from lighten.samples import Samples
from lighten.shrink import shrink
from lighten.simulate import Simulation
from lighten.sparse import format_of, pattern_of
from lighten.sparsify import sparsify
from lighten.structure import Spend, free, narrow
from lighten.types import Axis, Budget, Plan, Spec
from lighten.widths import Curve, branches, keep_of, spend, uniform

BATCH = 128

_OWN = ("accuracy", "evaluate")
"""What is said of the original: all else compares it with itself."""


@dataclass(frozen=True, eq=False)
class Job:
    """What all stages of a run have in common. bits: of weights and activations, None: float.
    reduce_range: weights of 7 bits, where this processor's products of 8 bits saturate."""

    run: Run
    network: Network
    samples: Samples
    exporter: Any
    bits: tuple[int, int] | None
    reduce_range: bool
    multiple: int
    sparsity: str | None
    evaluate: Callable[[Any], float] | None


def compress_network(
    network: Network,
    data: Samples,
    *,
    budget: str | None = None,
    export: str = "onnx",
    quantize: str = "auto",
    sparsity: str | None = None,
    evaluate: Callable[[Any], float] | None = None,
    multiple: int | None = None,
    out: str | Path | None = None,
) -> Result:
    """Make a network fit `budget` ("0.5 macs", "2M params", "300kB", "25%", "12ms", "50% ms").

    quantize: "int8" (or "w8a8"), "w4a8", "w4a4", "none", or "auto": 8 bits where the budget is in
    bytes or milliseconds, or there is no budget. sparsity: of the weights that are left once the
    structure stands, "0.5" or "2:4" (all layers but the first and the last). multiple: channel
    counts are multiples of it (8 for milliseconds, else 1). evaluate: called with the network (a
    callable on batches), returns what counts, higher is better; else agreement with the original
    and, with labels, accuracy.

    Calling again resumes. Raises UserError for what a person can mend.
    """
    limit = None if budget is None else Budget.parse(budget)
    if sparsity is not None and quantize == "auto":
        quantize = "none"
    bits = precision(quantize, limit)
    if sparsity is not None:
        pattern_of(sparsity)
        if bits is not None:
            raise WrongUse(
                f"sparsity `{sparsity}` and quantize `{quantize}` at once",
                "no runtime here gains from both: choose one",
            )
    if limit is None and bits is None and sparsity is None:
        raise WrongUse("there is nothing to do", 'give a budget, such as --budget "0.5 macs"')
    exporter = exporters[export]
    if limit is not None:
        network_cost.check(limit, export)
    if why := exporter.refuses(network):
        raise WrongUse(f"`{export}` cannot hold this network: {why}", _others(network))
    if multiple is not None and multiple < 1:
        raise WrongUse(f"multiple={multiple}", "at least 1: channel counts are multiples of it")
    if multiple is None:
        multiple = 8 if limit is not None and limit.unit == "ms" else 1
    reduced = bits == (8, 8) and saturates()
    folder = (
        Path(out)
        if out is not None
        else default_folder(_name(network), budget or sparsity or quantize)
    )
    wanted = {
        "model": network.digest, "data": data.digest, "source": network.source, "export": export,
        "budget": "".join(budget.split()) if budget else None, "quantize": quantize,
        "sparsity": sparsity, "evaluate": getattr(evaluate, "__qualname__", evaluate and "given"),
        "reduce_range": reduced, "multiple": multiple,
        "inputs": [list(x.shape) for x in network.inputs],
    }  # fmt: skip
    preflight(folder, disk=8 * network.nbytes, memory=_memory_needed(network, data))
    with Run.open(folder, wanted) as run:
        job = Job(run, network, data, exporter, bits, reduced, multiple, sparsity, evaluate)
        before = _before(job, export)
        small, plan, plans = _structure(job, limit, before)
        given, place = plan.to_json(), _place(job, export)
        if run.whole(place, given=given) and run.whole("metrics.json", given=given):
            stored = run.json("metrics", dict, given=given)
            return Result(folder, run.path(place), plan, stored, small.module)
        small, sparse = _sparse(job, small, plan)
        made = _quantized(job, small) if bits else small
        if sparse is not None and export == "checkpoint":
            made = sparse
        exported = _export(job, made, plan, export)
        metrics = run.json(
            "metrics",
            lambda: network_results.results(
                before, _after(job, made, small, exported, export), plans, plan,
                [*small.notes, *exporter.notes(made)], data, _room(limit, before),
            ),
            given=given,
        )  # fmt: skip
        return Result(folder, exported, plan, metrics, small.module)


# -- stages --------------------------------------------------------------------------------------
def _before(job: Job, export: str) -> dict[str, Any]:
    """The original: cost, quality, and speed in the runtime."""
    path = job.run.file(
        f"original/{_name(job.network)}{job.exporter.suffix}",
        lambda path: job.exporter.write(job.network, path),
    )

    def work() -> dict[str, Any]:
        with stage("measure the original"):
            return {
                **network_cost.sizes(job.network),
                **network_cost.speed(export, path),
                **{k: v for k, v in _quality(job, job.network).items() if k in _OWN},
            }

    found: dict[str, Any] = job.run.json("measured/original", work)
    return found


def _structure(
    job: Job, limit: Budget | None, before: Mapping[str, Any]
) -> tuple[Network, Plan, list[dict[str, Any]]]:
    """The network at the widths that meet the budget; the plain choice is measured beside."""
    if limit is None:
        return job.network, Plan({}), []
    room = limit.amount(network_cost.now(limit, before))
    with stage("couple channels"):
        couplings = couple(job.network)
    for name, nodes in couplings.unknown.items():
        note(f"operator {name} has no rule: what it touches keeps its width ({len(nodes)} places)")
    spent = network_cost.spend(
        job.network, couplings.free, limit, job.bits[0] if job.bits else 32,
        lambda network, path: job.exporter.write(_roughly(job, network), path),
        job.run.folder / "latencies.json",
    )  # fmt: skip
    # stored, for a time that is taken again may be on the other side of the budget
    whole = job.run.json("measured/whole", lambda: {"cost": spent.actual(job.network)})
    if whole["cost"] <= room:
        note("the budget is met with no channel removed")
        return job.network, Plan({}), []
    found = _curves(job, couplings)
    axes = free(couplings.axes, found)
    streams = {a.name for a in axes} - {a.name for a in branches(axes)}
    ways = {"allocated": partial(spend, held=()), "uniform": partial(uniform, held=streams)}
    if 0 < len(streams) < len(axes):
        ways = {"branches": partial(spend, held=streams), **ways}
    made: dict[str, Shrunk] = {}
    for name, way in ways.items():
        try:
            shrunk = _at_budget(job, couplings, found, spent, room, axes, name, way)
        except ImpossibleBudget as error:
            raise ImpossibleBudget(
                f"budget in {limit.unit}: {error.message}", error.hint, error.least
            ) from error
        if shrunk is not None:
            made[name] = shrunk
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


def _at_budget(
    job: Job, couplings: Couplings, found: Mapping[str, Curve], spent: Spend, room: float,
    axes: list[Axis], name: str, way: Callable[..., dict[str, int]],
) -> Shrunk | None:  # fmt: skip
    """Widths that meet the budget, chosen one way; every step stored. None where a plain way does
    not come under it, stored too: a time that is taken again could be on the other side."""

    def widths() -> dict[str, int] | None:
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

    stored = job.run.json(f"widths/{name}", widths)
    if stored is None:
        return None
    chosen = {str(k): int(v) for k, v in stored.items()}
    keep = keep_of(found, chosen)
    small = shrink(job.network, couplings, keep)

    def compensated() -> Mapping[str, Tensor]:
        with stage(f"compensate ({name})", len(job.network.layers), "weights") as tick:
            better = compensate(
                job.network, small, couplings, keep, job.samples.calibration, tick=tick
            )
        return better.module.state_dict()

    small.module.load_state_dict(job.run.tensors(f"shrunk/{name}", compensated, given=chosen))

    def quality() -> dict[str, Any]:
        with stage(f"measure ({name})"):
            return {**network_cost.sizes(small), **_quality(job, small)}

    return Shrunk(small, chosen, job.run.json(f"measured/{name}", quality, given=chosen))


def _curves(job: Job, couplings: Couplings) -> dict[str, Curve]:
    """What every free axis loses at every width; stored."""

    def work() -> Mapping[str, Tensor]:
        with stage("sensitivity of axes", len(couplings.free), "axes") as tick:
            found = curves(job.network, couplings, job.samples.calibration, tick=tick)
        parts = {}
        for name, curve in found.items():
            parts[f"{name}/order"], parts[f"{name}/error"] = curve.order, curve.error
        return parts

    parts = job.run.tensors("curves", work)
    names = dict.fromkeys(key.rpartition("/")[0] for key in parts)
    return {n: Curve(parts[f"{n}/order"], parts[f"{n}/error"]) for n in names}


def _sparse(job: Job, network: Network, plan: Plan) -> tuple[Network, Quantized | None]:
    """Weights pruned after the structure, by OBS; None where that was not asked for."""
    if job.sparsity is None:
        return network, None
    layers = [layer for layer in network.layers if layer.calls == 1][1:-1]
    spec = Spec.parse(f"f32+{job.sparsity}@obs")
    specs = {la.name: spec for la in layers if format_of(spec).accepts(la.shape) is None}
    if job.exporter.name == "onnx":
        note("ONNX stores zeros in full: export a checkpoint for fewer bytes")
    with stage("prune weights"):
        pruned, weights = sparsify(network, job.samples.calibration, specs)
    return pruned, Quantized(pruned, weights, {})


def _quantized(job: Job, network: Network) -> Quantized:
    """Ranges, transforms and rounding. Deterministic, and so not stored but made again."""
    weights, activations = job.bits or (8, 8)
    with stage("quantize"):
        return quantize_network(
            network,
            job.samples.calibration,
            bits_weights=weights,
            bits_activations=activations,
            reduce_range=job.reduce_range,
        )


def _roughly(job: Job, network: Network) -> Network | Quantized:
    """What would be exported, but with numbers that only its size and speed do not depend on."""
    if job.bits is None:
        return network
    return quantize_network(
        network, job.samples.calibration[:4], bits_weights=job.bits[0],
        bits_activations=job.bits[1], ranges="minmax", solver="rtn",
        reduce_range=job.reduce_range,
    )  # fmt: skip


def _export(job: Job, made: Network | Quantized, plan: Plan, export: str) -> Path:
    """Write, open in the real runtime, compare with what was meant."""

    def write(path: Path) -> None:
        job.exporter.write(made, path)
        if export == "onnx":
            network_results.verify(path, made, job.samples.held_out[:8])

    job.run.file("plan.json", lambda path: write_text(path, plan.to_json()), given=plan.to_json())
    with stage(f"export {export}"):
        return job.run.file(_place(job, export), write, given=plan.to_json())


def _after(
    job: Job, made: Network | Quantized, small: Network, exported: Path, export: str
) -> dict[str, Any]:
    """The file's size and speed, the quality of what it computes, and its layers' formats."""
    with stage("measure the result"):
        return {
            **network_cost.sizes(small),
            **network_cost.speed(export, exported),
            **_quality(job, runner(made)),
        }


def _quality(job: Job, network: Callable[[Tensor], Any]) -> dict[str, Any]:
    """Against the original, on what was held out."""
    reference = job.run.tensors(
        "original/outputs", lambda: {"outputs": outputs(job.network, job.samples.held_out, BATCH)}
    )["outputs"]
    found = measure_network(
        network, job.samples.held_out, job.samples.labels, reference=reference,
        evaluate=job.evaluate, size=BATCH,
    )  # fmt: skip
    hidden = ("examples", "reference_accuracy")
    return {k: v for k, v in found.as_dict().items() if k not in hidden}


# -- small things --------------------------------------------------------------------------------
def runner(made: Network | Quantized) -> Callable[[Tensor], Any]:
    """What a network, or the runtime's arithmetic of a quantized one, gives for a batch."""
    return Simulation(made) if isinstance(made, Quantized) else made


def _room(limit: Budget | None, before: Mapping[str, Any]) -> tuple[str, float] | None:
    """(quantity, the most that it may be) of a budget."""
    if limit is None:
        return None
    return network_cost.quantity(limit), limit.amount(network_cost.now(limit, before))


def _others(network: Network) -> str:
    able = [name for name in sorted(exporters) if not exporters[name].refuses(network)]
    return f"what can hold it: {', '.join(able) or 'nothing that lighten writes'}"


def _place(job: Job, export: str) -> str:
    """Where the exported file is in the run."""
    suffix = job.exporter.suffix
    return f"exports/{job.run.folder.name + suffix if suffix else export}"


def _name(network: Network) -> str:
    """What the network is called in names of files."""
    last = network.source.rpartition(":")[2].partition("(")[0]
    found = re.sub(r"\W+", "-", Path(last).name.removesuffix(".pt2")).strip("-")
    return found or "network"


def _memory_needed(network: Network, data: Samples) -> int:
    """Bytes: the data, the network a few times, and libraries. Deliberately low."""
    return 2 * data.calibration.numel() * 4 + 6 * network.nbytes + 300_000_000
