"""What a run on a language model keeps so that it can be looked at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lighten.candidates import stored_candidates
from lighten.data import Corpus
from lighten.language_job import Job
from lighten.look import keep
from lighten.look.language_curve import BUDGETS, curve
from lighten.look.language_differences import continuation, passages
from lighten.look.language_layers import layers
from lighten.look.provenance import provenance
from lighten.progress import stage
from lighten.recover_language import Made
from lighten.types import Plan


def look(
    job: Job, corpus: Corpus, made: Made, tried: Mapping[str, Plan], exported: Path,
    metrics: Mapping[str, Any],
) -> None:  # fmt: skip
    """Store look/*.json of a run whose metrics stand. tried: what was measured, by its name."""
    run, model, specs = job.run, job.model, made.plan.specs
    rows, given = stored_candidates(run), made.given
    with stage("look", len(model.layers) + BUDGETS + 4, "steps") as tick:
        keep(
            run, "layers",
            lambda: layers(model, job.exporter, specs, made.weights, rows, tick), given=given,
        )  # fmt: skip
        keep(
            run, "curve",
            lambda: curve(rows, job.exporter.fixed_bytes(model), _measured(job, tried), metrics,
                          tick),
            given=given,
        )  # fmt: skip

        def differences() -> dict[str, Any]:
            kld = _divergences(job, made, tried, metrics)
            rows = [] if kld is None else passages(model.tokenizer, job.held_out, kld)
            found = {"kind": "text", "windows": rows}
            return found | continuation(model, exported, job.held_out, kld, tick)

        keep(run, "differences", differences, given=given)
    keep(run, "provenance", lambda: _provenance(job, corpus))


def _measured(job: Job, tried: Mapping[str, Plan]) -> dict[str, tuple[Plan, dict[str, Any]]]:
    """The plans that were assembled, and what was measured of them."""
    return {
        name: (plan, job.run.json(f"measured/{name}", dict, given=dict(plan.specs)))
        for name, plan in tried.items()
    }


def _divergences(
    job: Job, made: Made, tried: Mapping[str, Plan], metrics: Mapping[str, Any]
) -> Tensor | None:
    """How far the model that was written is off at each position (windows, length - 1), in nats.

    None where that was not kept.
    """
    specs = dict(made.plan.specs)
    names = ["recovered"] if metrics["plan"] == "recovered" else list(tried)
    for name in names:
        if job.run.whole(f"measured/{name}.safetensors", given=specs):
            return job.run.tensors(f"measured/{name}", dict, given=specs)["kld"]
    return None


def _provenance(job: Job, corpus: Corpus) -> dict[str, Any]:
    model = job.model
    return provenance(
        job.run, command(job.run.request, corpus),
        model={"source": job.run.request["source"], "digest": model.digest, "kind": model.kind,
               "parameters": model.parameters, "bytes": model.nbytes},
        data={"source": corpus.source, "digest": corpus.digest, "bytes": corpus.nbytes},
        seed=job.seed,
    )  # fmt: skip


def command(request: Mapping[str, Any], corpus: Corpus) -> list[str]:
    """The words of the line that makes a run with this request."""
    words = ["lighten", "compress", str(request["source"])]
    options = {
        "budget": request["budget"], "max-kld": request["max_kld"],
        "data": None if corpus.builtin else corpus.source, "export": request["export"],
        "recover": request.get("recover"), "learn-from": request.get("learn_from"),
        "samples": request["samples"], "length": request["length"], "seed": request["seed"],
    }  # fmt: skip
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", f"{value}"]
    return [*words, "--even-columns"] if request.get("columns") == "even" else words
