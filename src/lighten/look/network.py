"""What a run on a network keeps so that it can be looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lighten.coupling import couple
from lighten.job import BATCH, Job, runner
from lighten.look import FOLDER, keep
from lighten.look.network_axes import axes
from lighten.look.network_curve import SHARES, curve, nats, other_budgets, trust
from lighten.look.network_differences import differences
from lighten.look.network_layers import Told, layers
from lighten.look.provenance import provenance
from lighten.network import Network
from lighten.network_quality import outputs
from lighten.network_structure import read_curves
from lighten.progress import stage
from lighten.quantized import Quantized
from lighten.run import Run
from lighten.structure import free
from lighten.types import Plan

OUTPUTS = "measured/outputs"
"""What was exported gave for the held-out examples; the original's are in original/outputs."""


def looked(run: Run, given: str) -> bool:
    """Whether a run with this plan has been looked at."""
    return all(run.whole(f"{FOLDER}/{name}.json") for name in ("layers", "provenance")) and (
        run.whole(f"{FOLDER}/layers.json", given=given)
    )


def look(
    job: Job, made: Network | Quantized, small: Network, plan: Plan, metrics: Mapping[str, Any],
    asked: Mapping[str, Any] | None,
) -> None:  # fmt: skip
    """Store look/*.json of a run whose metrics stand. small: at the plan's widths. made: what was
    exported. asked: how the run is made again, where that can be told."""
    run, given, told = job.run, plan.to_json(), stored(job.run)
    with stage("look", len(job.network.layers) + 2 * len(SHARES) + 2, "steps") as tick:
        couplings = couple(job.network)
        keep(
            run, "layers",
            lambda: layers(job.network, small, made, couplings, plan, told, tick), given=given,
        )  # fmt: skip
        keep(run, "axes", lambda: axes(job.network, couplings, plan.widths), given=given)
        tick()

        def points() -> list[dict[str, Any]]:
            able = free(couplings.axes, told.curves)
            others = other_budgets(job.network, able, told.curves, job.multiple, tick)
            known = {n: w for n, w in plan.widths.items() if n in told.curves}
            return curve(metrics, plan, others, trust(metrics, nats(told.curves, known)))

        keep(run, "curve", points, given=given)

        def found() -> dict[str, Any]:
            before = run.tensors("original/outputs", dict)["outputs"]
            return differences(before, answers(job, made, given)["outputs"], job.samples)

        keep(run, "differences", found, given=given)
        tick()
    keep(run, "provenance", lambda: _provenance(job, asked))


def answers(job: Job, made: Network | Quantized, given: str) -> dict[str, Tensor]:
    """What was exported gives on the held-out examples; stored."""
    return job.run.tensors(
        OUTPUTS, lambda: {"outputs": outputs(runner(made), job.samples.held_out, BATCH)},
        given=given,
    )  # fmt: skip


def stored(run: Run) -> Told:
    """The losses that a run has predicted on its way."""
    curves = read_curves(run.tensors("curves", dict)) if run.whole("curves.safetensors") else {}
    formats = run.json("format_errors", dict) if run.whole("format_errors.json") else {}
    return Told(curves, formats.get("weights", {}))


def _provenance(job: Job, asked: Mapping[str, Any] | None) -> dict[str, Any]:
    network, samples = job.network, job.samples
    found = provenance(
        job.run, [] if asked is None else command(asked),
        model={"source": network.source, "digest": network.digest,
               "kind": type(network.module).__name__, "parameters": network.parameters,
               "bytes": network.nbytes},
        data={"source": samples.source, "digest": samples.digest,
              "calibrated_on": len(samples.calibration), "examples": len(samples.held_out)},
        seed=0 if asked is None else int(asked.get("seed", 0)),
    )  # fmt: skip
    return found if asked is not None else {**found, "command": call(job.run.request)}


def command(asked: Mapping[str, Any]) -> list[str]:
    """The words of the line that makes a run; asked: arguments of lighten.compress, as kept."""
    words = ["lighten", "compress", str(asked["model"])]
    for name, value in asked.items():
        if name not in ("model", "length", "also") and value is True:
            words += [f"--{name.replace('_', '-')}"]
        elif name not in ("model", "length", "also") and value is not None:
            words += [f"--{name.replace('_', '-')}", f"{value}"]
    return words


def call(request: Mapping[str, Any]) -> str:
    """The call that makes a run of a module in memory, which no command line can name."""
    given = {
        name: request[name]
        for name in ("budget", "export", "quantize", "sparsity", "multiple")
        if request.get(name) is not None
    }
    if "recover" in request:
        given |= {"recover": request["recover"]["length"],
                  "learn_from": request["recover"]["learn_from"]}  # fmt: skip
    if isinstance(learn := request.get("learn"), Mapping):
        given |= {"learn": learn["length"], "learn_from": learn["learn_from"]}
        given |= {"learn_codes": True} if learn["codes"] else {}
    elif learn is not None:
        given["learn"] = learn
    words = ["model", "example_inputs", "data=data", *(f"{k}={v!r}" for k, v in given.items())]
    return f"lighten.compress({', '.join(words)})"
