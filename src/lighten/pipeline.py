"""compress(): the whole story. Every stage is stored in the run directory, and so resumes.

open -> sensitivity and candidates -> allocate -> solve -> measure against the uniform baseline ->
learn scales and norms back, if asked to -> export -> read back -> open in the real runtime ->
metrics
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lighten import allocate as knapsack
from lighten import even_columns as columns
from lighten.atomic import write_text
from lighten.calibrate import Stream
from lighten.candidates import as_row, candidates, stored_candidates
from lighten.choose_plan import best_of, smallest
from lighten.data import Corpus, load_text
from lighten.errors import WrongUse
from lighten.language_job import HELD_OUT_WINDOWS, Job, job_of
from lighten.look.language import look
from lighten.measure import fits_context
from lighten.model import Model, open_model
from lighten.preflight import preflight
from lighten.progress import stage
from lighten.quality import Reference, measure_weights
from lighten.recover_language import Made, broken, check_text, lessons, take, wish
from lighten.recover_language import made as made_by
from lighten.recover_language import recover as recover_language
from lighten.registry import exporters, formats
from lighten.report import cards, kept
from lighten.result import Result as Result
from lighten.results import results
from lighten.run import Run, default_folder
from lighten.sensitivity import sensitivities
from lighten.solve import Weights, solve
from lighten.stage_log import logged
from lighten.sweep import Factor
from lighten.types import Budget, Candidate, Layer, Plan, Spec, Stats
from lighten.verify import opens_in_llama_cpp, verify

SENSITIVITY_WINDOWS = 16
SOLVER = "gptq"


def compress(
    model: str | Path,
    *,
    budget: str | None = None,
    max_kld: float | None = None,
    data: str | Path | None = None,
    export: str = "gguf",
    out: str | Path | None = None,
    recover: str | None = None,
    learn_from: str | None = None,
    patience: int | None = None,
    even_columns: bool = False,
    samples: int = 64,
    length: int = 512,
    seed: int = 0,
) -> Result:
    """Make a language model fit `budget` ("80MB", "4.5bpw", "25%") and write it as `export`.

    max_kld: instead of a budget, the most nats per token that may be lost; the smallest model
    found that keeps it. data: text to calibrate on (lighten.data.load_text). samples windows of
    `length` tokens are used, and the next 16 to measure on. recover: "500steps" or "1epochs" of
    learning scales, mins and norms from the model as it came, on the text behind those; learn_from:
    a lesson, "logits:1" where none is given (see lighten.lesson). patience: evaluations without a
    better one after which it stops. even_columns: see lighten.even_columns. Calling again resumes.
    Raises UserError for what a person can mend.
    """
    if (budget is None) == (max_kld is None):
        raise WrongUse("give either a budget or max_kld", 'for example --budget "4.5bpw"')
    limit = None if budget is None else Budget.parse(budget)
    if max_kld is not None and not (0 < max_kld < math.inf):
        raise WrongUse(f"max_kld {max_kld:g} is no loss to keep to", "for example --max-kld 0.05")
    if samples < 1:
        raise WrongUse(f"{samples} windows of text", "--samples must be at least 1")
    exporter = exporters[export]
    folder = Path(out) if out is not None else default_folder(str(model), budget, max_kld)
    opened, corpus = open_model(model), load_text(data)
    if why := exporter.refuses(opened):
        others = [name for name in sorted(exporters) if not exporters[name].refuses(opened)]
        raise WrongUse(
            f"`{export}` cannot hold this model: {why}",
            f"what can hold it: {', '.join(others) or 'nothing that lighten writes'}",
        )
    fits_context(opened, length)
    even = {"columns": "even"} if even_columns else {}
    if even_columns:
        columns.places(opened)
    teach = wish(recover, learn_from, patience)
    limits = {"budget": "".join(budget.split()) if budget else None, "max_kld": max_kld}
    wanted = {"model": opened.digest, "data": corpus.digest, **limits}
    source = str(opened.path.absolute()) if Path(model).expanduser().exists() else str(model)
    settings = {"export": export, "samples": samples, "length": length, "seed": seed}
    settings |= teach | even
    if teach:
        check_text(corpus, opened.tokenizer, length, samples + HELD_OUT_WINDOWS, seed)
    preflight(folder, disk=3 * opened.nbytes, memory=_memory_needed(opened, samples * length))
    with Run.open(folder, wanted | settings | {"source": source}) as run, logged(run):
        job = job_of(run, opened, corpus, exporter, samples, length, seed)
        if even_columns:
            opened = columns.evened(run, opened)
            job = replace(job, model=opened)
        found, fixed = _candidates(job), exporter.fixed_bytes(opened)
        tried: dict[str, Plan] = {}
        measured = partial(_assembled, job, tried)
        if limit is not None:
            room = limit.limit(opened.parameters, _size_before(job))
            plan, quality = best_of(found, room, fixed, measured)
        else:
            plan, quality = smallest(found, float(max_kld or 0), fixed, measured)
        _all_solved(job, plan)
        made = Made(plan, Weights(run, opened, plan), opened)
        if teach:
            made, quality = _recovered(job, corpus, made, quality)
        exported = _export(job, made, export)
        metrics = run.json(
            "metrics",
            lambda: _metrics(job, corpus, made, quality, export, exported),
            given=made.given,
        )
        look(job, corpus, made, tried, exported, metrics)
        kept(folder)
        return Result(folder, exported, plan, metrics)


def replan(run: str | Path, budget: str) -> dict[str, Any]:
    """What another budget would buy, from the stored candidates: nothing is solved or measured."""
    if of_network(run):
        from lighten import network_runs

        return network_runs.replan(run, budget)
    with Run.at(run) as opened:
        if "student" in opened.request:
            raise WrongUse(f"{run} is a distillation: it has no plan", "ask for another student")
        model = _model_of(opened)
        job = Job(opened, model, exporters[opened.request["export"]], torch.empty(0),
                  torch.empty(0), 0)  # fmt: skip
        rows = stored_candidates(opened)
        if not rows:
            raise WrongUse(f"{run} has no candidates yet", "let `lighten compress` get past them")
        room = Budget.parse(budget).limit(model.parameters, _size_before(job))
        fixed = job.exporter.fixed_bytes(model)
        plan = knapsack.allocate(rows, room, fixed)
        name = f"plans/{budget.replace('%', 'pc').replace(' ', '')}.json"
        opened.file(name, lambda path: write_text(path, plan.to_json()))
        counts: dict[str, int] = {}
        for spec in plan.specs.values():
            counts[spec] = counts.get(spec, 0) + 1
        return {
            "budget": budget,
            "predicted_bytes": plan.predicted["bytes"],
            "predicted_kld": plan.predicted["nats"],
            "plan": str(opened.path(name)),
            "layers": [{"spec": s, "layers": n} for s, n in sorted(counts.items())],
        }


def export(run: str | Path, to: str) -> Path:
    """Write the weights that a finished run chose in another form; returns where."""
    if of_network(run):
        from lighten import network_runs

        return network_runs.export(run, to)
    if "student" in Run.at(run, lock=False).request:
        from lighten import distill_language

        return distill_language.export(run, to)
    with Run.at(run) as opened:
        if not opened.whole("plan.json"):
            raise WrongUse(f"{run} has no plan yet", "let `lighten compress` finish first")
        model = _model_of(opened)
        job = Job(opened, model, exporters[to], torch.empty(0), torch.empty(0), 0)
        plan = Plan.from_json(opened.path("plan.json").read_text(encoding="utf-8"))
        made = made_by(opened, model, plan)
        gone = [name for name in made.weights if not made.weights.stored(name)]
        if gone:
            raise WrongUse(
                f"{len(gone)} weights of {run} are gone or changed, such as `{gone[0]}`",
                "the line that made the run makes them again",
            )
        path = _export(job, made, to)
        cards(run)
        return path


def of_network(run: str | Path) -> bool:
    """Whether a run is one on a network: its request names the shapes of its inputs."""
    return "inputs" in Run.at(run, lock=False).request


def _model_of(run: Run) -> Model:
    """The model that a run was made of; raises WrongUse where another stands in its place."""
    source = run.request["source"]
    model = open_model(source)
    if model.digest != run.request["model"]:
        raise WrongUse(
            f"{source} is not the model that {run.folder} was made of: it has changed since",
            "put that model back, or compress this one with another --out",
        )
    return columns.evened(run, model) if run.request.get("columns") == "even" else model


# -- stages --------------------------------------------------------------------------------------
def _candidates(job: Job) -> list[Candidate]:
    """The stored candidates, or the sensitivity pass that finds them."""
    model, run = job.model, job.run
    outside = [layer for layer in model.layers if layer.block is None]
    kept = [f"model/{layer.name}" for layer in outside]
    rows = stored_candidates(run)
    if rows and all(run.whole(f"{key}.safetensors") for key in kept):
        return rows
    specs = {layer.name: _specs(job, layer) for layer in model.layers}
    rows = []
    sample = job.calibration[:SENSITIVITY_WINDOWS]
    with stage("sensitivity", 2 * len(model.blocks) + 1, "blocks") as tick:
        factors: dict[int, Factor] = {}
        for layer, stats in sensitivities(Stream(model, sample, batch=2), job.seed, tick):
            if id(stats.hessian) not in factors:  # layers that see the same input come in a row
                factors = {id(stats.hessian): Factor.of(stats.hessian)}
            sizes = {str(s): job.exporter.layer_bytes(model, layer, s) for s in specs[layer.name]}
            rows += candidates(
                layer, model.weight(layer), stats, specs[layer.name], sizes,
                factors[id(stats.hessian)],
                {str(s): job.exporter.rounds_inputs(model, layer, s) for s in specs[layer.name]},
            )  # fmt: skip
            if layer.block is None:
                parts = {
                    "hessian": stats.hessian, "gradient": stats.gradient,
                    "frequency": stats.frequency, "n": torch.tensor(stats.n),
                }  # fmt: skip
                here = {k: v for k, v in parts.items() if v is not None}
                run.tensors(f"model/{layer.name}", lambda here=here: here)  # type: ignore[misc]
    if not run.read("candidates"):
        run.append("candidates", [as_row(c) for c in rows])
    return rows


def _specs(job: Job, layer: Layer) -> list[Spec]:
    """Everything that the exporter can store this layer as."""
    found = [Spec()] + [Spec(format=name, solver=SOLVER) for name in sorted(formats)]
    allowed = [s for s in found if s.format is None or not formats[s.format].accepts(layer.shape)]
    return [s for s in allowed if job.exporter.accepts(s, layer, job.model) is None]


def _assembled(job: Job, tried: dict[str, Plan], name: str, plan: Plan) -> dict[str, Any]:
    """Solve a plan and measure it on the held-out windows; it is one of those that were tried."""
    tried[name] = plan
    weights = Weights(job.run, job.model, plan)
    outside = _outside(job)

    def work() -> None:
        with stage(f"solve {name}", len(job.model.blocks), "blocks") as tick:
            solve(weights, job.calibration, outside, tick=tick)

    return _measured(job, name, Made(plan, weights, job.model), work)


def _measured(
    job: Job, name: str, made: Made, first: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Quality on the held-out windows; how far each token is off stands beside it.

    first: what has to be done before, where it is not stored.
    """
    given, rows = dict(made.plan.specs), list[Tensor]()

    def work() -> dict[str, Any]:
        first()
        reference = _reference(job)
        with stage(f"measure {name}", len(job.model.blocks), "blocks") as tick:
            found = measure_weights(
                made.model, job.held_out, made.weights, reference, tick,
                lambda window: rows.append(cast("Tensor", window.kld).float()),
            )  # fmt: skip
        job.run.tensors(f"measured/{name}", lambda: {"kld": torch.stack(rows)}, given=given)
        return found

    found: dict[str, Any] = job.run.json(f"measured/{name}", work, given=given)
    return found


def _all_solved(job: Job, plan: Plan) -> None:
    """Solve again what a plan that was measured needs and someone has removed or changed."""
    weights = Weights(job.run, job.model, plan)
    if not all(weights.stored(name) for name in weights):
        with stage("solve again", len(job.model.blocks), "blocks") as tick:
            solve(weights, job.calibration, _outside(job), tick=tick)


def _reference(job: Job) -> Reference:
    """What the head is given by the model as it came, for the held-out windows."""

    def work() -> Mapping[str, Tensor]:
        with stage("run the original", len(job.model.blocks), "blocks") as tick:
            stream = Stream(job.model, job.held_out).through(tick)
            return {"hidden": torch.stack(list(stream.outputs()))}

    return Reference(job.run.tensors("model/reference", work)["hidden"])


def _outside(job: Job) -> dict[str, Stats]:
    found = {}
    for layer in job.model.layers:
        if layer.block is None:
            parts = job.run.tensors(f"model/{layer.name}", dict)
            found[layer.name] = Stats(
                int(parts["n"]), parts["hessian"], gradient=parts.get("gradient"),
                frequency=parts.get("frequency"),
            )  # fmt: skip
    return found


def _recovered(
    job: Job, corpus: Corpus, old: Made, quality: dict[str, Any]
) -> tuple[Made, dict[str, Any]]:
    """What the weights learned, where that lost no more on the held-out windows than before."""
    model, asked = job.model, job.run.request
    first = len(job.calibration) + len(job.held_out)
    text = partial(lessons, corpus, model.tokenizer, job.held_out.shape[1], first, asked["recover"],
                   job.seed)  # fmt: skip
    full = torch.float32 if job.exporter.name == "gguf" else None
    how = {k: asked[k] for k in ("learn_from", "patience") if k in asked} | {"seed": job.seed}
    new = recover_language(job.run, old, text, length=asked["recover"], vectors=full, **how)
    after = _measured(job, "recovered", new)
    taken = take(job.run, old, new, quality[quality["chosen"]], after)
    chosen = "recovered" if taken.weights is new.weights else quality["chosen"]
    return taken, {**quality, "recovered": after, "chosen": chosen, "quantized": quality["chosen"]}


def _export(job: Job, made: Made, to: str) -> Path:
    """Write, read back and compare, and open in the runtime where lighten has one."""
    plan, weights, model = made.plan, made.weights, made.model
    job.run.once("plan.json", lambda: plan, save=lambda p, path: write_text(path, p.to_json()),
                 load=lambda path: Plan.from_json(path.read_text()),
                 given=dict(plan.specs))  # fmt: skip
    name = job.run.folder.name + job.exporter.suffix if job.exporter.suffix else to

    def write(path: Path) -> None:
        job.exporter.write(model, weights, path)
        verify(job.exporter, model, weights, path)
        if to == "gguf":
            opens_in_llama_cpp(path)

    with stage(f"export {to}"):
        return job.run.file(f"exports/{name}", write, given=made.given)


def _metrics(
    job: Job, corpus: Corpus, made: Made, quality: dict[str, Any], export: str, exported: Path
) -> dict[str, Any]:
    facts = results(job.model, export, quality, exported, made.plan.predicted["nats"])
    if made.learned is not None:
        facts["recover"] = [made.learned]
        facts["problems"] += broken(made.learned)
    facts["data"] = corpus.source
    if job.run.request.get("columns") == "even":
        facts["notes"].append("columns were made even before they were rounded")
    if corpus.builtin:
        facts["notes"].append(
            "calibrated and measured on the short text that lighten brings along; give --data"
        )
    return facts


# -- small things --------------------------------------------------------------------------------
def _size_before(job: Job) -> int:
    """Bytes that the export would have with nothing compressed."""
    size: int = job.exporter.nbytes(job.model, {})
    return size


def _memory_needed(model: Model, tokens: int) -> int:
    """Bytes: hidden states, the largest layer a few times, and libraries. Deliberately low."""
    largest = max(layer.size for layer in model.layers)
    width = max(layer.shape[1] for layer in model.layers if layer.kind != "linear")
    return 4 * (tokens * width + 3 * largest) + 400_000_000
