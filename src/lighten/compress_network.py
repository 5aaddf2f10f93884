"""compress() for networks: prune -> compensate -> quantize -> export -> measure, on one screen.

Every stage is stored in the run directory, and so resumes. What a budget is spent in decides what
is done: multiply-adds and parameters by structure alone, bytes and milliseconds by structure and
the formats of layers together; `quantize` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lighten import network_cost, network_results
from lighten.atomic import write_text
from lighten.cpu import saturates
from lighten.errors import WrongUse
from lighten.exporters.checkpoint import Built
from lighten.job import Job, called, quality, quantized, runner
from lighten.look.network import OUTPUTS, look, looked
from lighten.network import Network
from lighten.network_mixed import made_of, mixed
from lighten.network_structure import read_curves, structure
from lighten.pipeline import Result
from lighten.precision import mixes, precision
from lighten.preflight import preflight
from lighten.progress import note, stage
from lighten.quantized import Quantized
from lighten.recover_stage import Recovery, recovered
from lighten.registry import exporters
from lighten.report import kept
from lighten.run import Run, default_folder
from lighten.samples import Samples
from lighten.scales_stage import Scales, joined, rescaled
from lighten.shrink import is_graph
from lighten.sparse import format_of, pattern_of
from lighten.sparsify import sparsify, without_zeros
from lighten.stage_log import logged
from lighten.types import Budget, Plan, Spec
from lighten.widths import keep_of

_OWN = ("accuracy", "evaluate")
"""What is said of the original: all else compares it with itself."""


def compress_network(
    network: Network,
    data: Samples,
    *,
    budget: str | None = None,
    export: str = "onnx",
    quantize: str = "auto",
    sparsity: str | None = None,
    recovery: Recovery | None = None,
    scales: Scales | None = None,
    evaluate: Callable[[Any], float] | None = None,
    multiple: int | None = None,
    out: str | Path | None = None,
    also: str | None = None,
    asked: Mapping[str, Any] | None = None,
) -> Result:
    """Make a network fit `budget` ("0.5 macs", "2M params", "300kB", "25%", "12ms", "50% ms").

    quantize: "int8" (or "w8a8"), "w4a8", "w4a4", "w8" and "w4" (weights alone), "none", "mixed"
    (each layer in the format that spends a budget in bytes or milliseconds best), or "auto": mixed
    for such a budget, 8 bits without one, float with a sparsity. sparsity: of the weights that are
    left once the structure stands, "0.5" or "2:4" (all layers but the first and the last); integers
    are made of those, and zeros stay zero. recovery: what is learned back from the original before
    quantization. scales: how its integers learn from the original after that. multiple: channel
    counts are multiples of it (8 for milliseconds, else 1). evaluate: called with the network (a
    callable on batches), returns what counts, higher is better; else agreement with the original
    and, with labels, accuracy.

    also: an exporter that writes what was made in its form too; then it is what the result names.
    asked: how all this is opened again, which the run keeps.

    Calling again resumes. Raises UserError for what a person can mend.
    """
    limit = None if budget is None else Budget.parse(budget)
    if sparsity is not None and quantize == "auto":
        quantize = "none"
    bits = precision(quantize, limit)
    if sparsity is not None:
        pattern_of(sparsity)
    if limit is None and bits is None and sparsity is None:
        raise WrongUse("there is nothing to do", 'give a budget, such as --budget "0.5 macs"')
    if bits is None:
        if scales is not None and scales.asked:
            raise WrongUse(
                f"learn={scales.length} and no integers to learn: quantize is `{quantize}`",
                "quantize to int8, w4a8, w8 ...; weights that are float learn by recover",
            )
        scales = None
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
        else default_folder(called(network), budget or sparsity or quantize)
    )
    wanted = {
        "model": network.digest, "data": data.digest, "source": network.source, "export": export,
        "budget": "".join(budget.split()) if budget else None, "quantize": quantize,
        "sparsity": sparsity, "evaluate": getattr(evaluate, "__qualname__", evaluate and "given"),
        "reduce_range": reduced, "multiple": multiple,
        "inputs": [list(x.shape) for x in network.inputs],
        **({} if recovery is None else {"recover": recovery.request()}),
        **_learned(scales, recovery is not None and bits is not None),
    }  # fmt: skip
    preflight(folder, disk=8 * network.nbytes, memory=_memory_needed(network, data))
    with Run.open(folder, wanted) as run, logged(run):
        job = Job(run, network, data, exporter, bits, reduced, multiple, sparsity, evaluate)
        if scales is not None:
            job = replace(job, learned=scales.data.course.count)
        if any(part is not None and part.lesson.numbers for part in (recovery, scales)):
            job = replace(job, logits=False if data.labels is None else None)
        if asked is not None:
            run.json("asked", lambda: dict(asked), given=dict(asked))
        before = _before(job, export)
        mix = mixes(quantize, limit)
        if limit is not None and mix:
            small, plan, plans = mixed(job, limit, before)
        else:
            small, plan, plans = structure(job, limit, before)
        given, place = plan.to_json(), _place(job, export)
        done = also is None and run.whole(place, given=given) and looked(run, given)
        small, sparse = _sparse(job, small, plan)
        if done and run.whole("metrics.json", given=given):
            stored = run.json("metrics", dict, given=given)
            if recovery is not None:
                small, *_ = recovered(job, small, sparse, recovery, before, given)
            return Result(folder, run.path(place), plan, stored, small.module)
        learned: dict[str, Any] = {}
        if recovery is not None:
            small, sparse, learned = recovered(job, small, sparse, recovery, before, given)
        made = made_of(job, small, plan) if mix else quantized(job, small) if bits else small
        if scales is not None and isinstance(made, Quantized):
            made, more = rescaled(job, made, scales, given)
            learned = joined(learned, more, before)
        exporter, form = _form(job, plan, small, made, sparse, export)
        exported = _export(replace(job, exporter=exporter), form, plan, export)
        metrics = run.json(
            "metrics",
            lambda: network_results.results(
                *_both(job, before, form, small, exported, export, given), plans, plan,
                [*small.notes, *exporter.notes(form)], data, limit, learned,
            ),
            given=given,
        )  # fmt: skip
        if also is not None:
            exporter, other = _form(job, plan, small, made, sparse, also)
            exported = _export(replace(job, exporter=exporter), other, plan, also)
        look(job, form, small, plan, metrics, asked)
        kept(folder)
        return Result(folder, exported, plan, metrics, small.module)


# -- stages --------------------------------------------------------------------------------------
def _before(job: Job, export: str) -> dict[str, Any]:
    """The original: cost, quality, and speed in the runtime."""
    key = job.original.relative_to(job.run.folder).as_posix()
    path = job.run.file(key, lambda path: job.exporter.write(job.network, path))

    def work() -> dict[str, Any]:
        with stage("measure the original"):
            return {
                **network_cost.sizes(job.network),
                **network_cost.speed(export, path),
                **{k: v for k, v in quality(job, job.network).items() if k in _OWN},
            }

    found: dict[str, Any] = job.run.json("measured/original", work)
    return found


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


def _form(
    job: Job, plan: Plan, small: Network, made: Network | Quantized, sparse: Quantized | None,
    to: str,
) -> tuple[Any, Network | Quantized]:  # fmt: skip
    """The exporter `to`, and `made` as it stores it. A checkpoint leaves zeros out, and says how
    the network was built from the original, for lighten.load.

    small: at the plan's widths, before it was rounded.
    """
    if to != "checkpoint":
        return exporters[to], made
    stays = {}
    if plan.widths:
        keep = keep_of(read_curves(job.run.tensors("curves", dict)), plan.widths)
        stays = {axis: units.tolist() for axis, units in keep.items()}
    folded = isinstance(made, Quantized) and made.network is not small
    built = Built(graph=is_graph(small.module), folded=folded)
    exporter = replace(exporters[to], kept=stays, built=built)
    return exporter, made if sparse is None else without_zeros(made, sparse)


def _export(job: Job, made: Network | Quantized, plan: Plan, export: str) -> Path:
    """Write, open in the real runtime, compare with what was meant."""

    def write(path: Path) -> None:
        job.exporter.write(made, path)
        if export == "onnx":
            network_results.verify(path, made, job.samples.held_out[:8])

    job.run.file("plan.json", lambda path: write_text(path, plan.to_json()), given=plan.to_json())
    with stage(f"export {export}"):
        return job.run.file(_place(job, export), write, given=plan.to_json())


def _both(
    job: Job, before: Mapping[str, Any], made: Network | Quantized, small: Network, exported: Path,
    export: str, given: str,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """What was measured of the original, its speed again in turns with the exported file's; and of
    that file its size and speed, and the quality of what it computes."""
    with stage("measure the result"):
        files = {"before": job.original, "after": exported}
        found = network_cost.speeds(export, files)
        good = quality(job, runner(made), OUTPUTS, given)
        after = {**network_cost.sizes(small), **found["after"], **good}
        return {**before, **found["before"]}, after


# -- small things --------------------------------------------------------------------------------
def _learned(scales: Scales | None, usual: bool) -> dict[str, Any]:
    """What the request says of integers that learn, where it is not what a recovery suggests."""
    if scales is None:
        return {"learn": "none"} if usual else {}
    return {"learn": scales.request()} if scales.asked or scales.codes else {}


def _others(network: Network) -> str:
    able = [name for name in sorted(exporters) if not exporters[name].refuses(network)]
    return f"what can hold it: {', '.join(able) or 'nothing that lighten writes'}"


def _place(job: Job, export: str) -> str:
    """Where the exported file is in the run."""
    suffix = job.exporter.suffix
    return f"exports/{job.run.folder.name + suffix if suffix else export}"


def _memory_needed(network: Network, data: Samples) -> int:
    """Bytes: the data, the network a few times, and libraries. Deliberately low."""
    return 2 * data.calibration.numel() * 4 + 6 * network.nbytes + 300_000_000
