"""What a run on a network has to show, and whether the file in its runtime is what was meant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lighten.breakdown import lower_rate
from lighten.errors import BadOutput
from lighten.network import Network
from lighten.network_cost import quantity
from lighten.progress import note
from lighten.quantized import Quantized
from lighten.samples import Samples
from lighten.simulate import Simulation
from lighten.types import Budget, Plan

FLOAT_ERROR = 1e-4
"""Relative error that float kernels of two makers may differ by, over a whole network."""

INTEGER_ERROR = 0.1
"""The same for integers: a value that lies between two codes may go either way, and what follows
sees a whole step. A wrong scale or a lost bias is far above."""

TIME_NOISE = 0.05
"""Share by which two timings of one file may differ."""

SLOWER = 1 + TIME_NOISE

CALL_NOISE_MS = 0.03
"""By how much the call itself varies, which matters for networks that are this quick."""

_QUALITY = ("accuracy", "evaluate", "top1_agreement", "mean_kld", "p99_kld", "sqnr_db")


def verify(path: Path, made: Network | Quantized, inputs: Tensor) -> dict[str, float]:
    """Open an ONNX file in onnxruntime and compare with what it should compute, on `inputs`.

    {"relative_error"}; raises BadOutput where it is too large. Nothing is checked, and that is
    said, where onnxruntime is not installed.
    """
    from lighten.runtimes import onnxruntime

    if not onnxruntime.available():
        note("onnxruntime is not installed (pip install lighten[onnx]); the file was not run")
        return {}
    integers = isinstance(made, Quantized)
    runner = Simulation(made) if isinstance(made, Quantized) else made
    with torch.no_grad():
        expected = runner(inputs)
    wanted = [t for t in torch.utils._pytree.tree_leaves(expected) if isinstance(t, Tensor)]
    found = onnxruntime.run(path, inputs)
    error = max(_relative(f, w) for f, w in zip(found, wanted, strict=True))
    if not error <= (INTEGER_ERROR if integers else FLOAT_ERROR):
        raise BadOutput(
            f"{path.name} computes something else in onnxruntime: relative error {error:.2g}",
            "please report this with the network; nothing else was changed",
        )
    return {"relative_error": error}


def results(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    plans: Sequence[Mapping[str, Any]],
    plan: Plan,
    notes: Sequence[str],
    data: Samples,
    limit: Budget | None = None,
    learned: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """{"before", "after"}: quantities by name; "plans": what was measured; "problems", "notes";
    "formats": how many layers have which, where they have their own.

    limit: the budget, a share of what `before` says. learned: what recovery
    adds, "recover" and "steps", of which the last is what was exported.
    """
    problems = []
    if after["bytes"] > before["bytes"]:
        sizes = f"{after['bytes'] / 1e6:.2f} MB, {before['bytes'] / 1e6:.2f} MB"
        problems.append(f"the output is larger than the input ({sizes})")
    if after.get("p50_ms", 0) > SLOWER * before.get("p50_ms", float("inf")) + CALL_NOISE_MS:
        times = f"{after['p50_ms']:.3g} ms, {before['p50_ms']:.3g} ms"
        problems.append(f"the output is slower than the input ({times})")
    if limit is not None:
        name = quantity(limit)
        most = limit.amount(float(before[name]))
        if after[name] > (1 + TIME_NOISE if name == "p50_ms" else 1) * most:
            problems.append(
                f"the budget is not met: {name} {after[name]:,.6g}, allowed {most:,.6g}"
            )
    problems += [_broken(row) for row in (learned or {}).get("recover", []) if "broke" in row]
    chosen = next((row["plan"] for row in plans if row.get("chosen")), "")
    remarks = list(notes)
    if chosen == "uniform":
        remarks.append("the same share of every axis measured better than the allocated plan")
    short = [{k: v for k, v in row.items() if k not in ("parameters",)} for row in plans]
    return {
        "before": dict(before),
        "after": dict(after),
        "examples": len(data.held_out),
        "calibrated_on": len(data.calibration),
        "data": data.source,
        "plan": chosen,
        "plans": short,
        **_with_last_step(learned or {}, after),
        "widths": [{"axis": name, "units": width} for name, width in plan.widths.items()],
        **_formats(plan),
        "notes": remarks,
        "problems": problems,
    }


def _broken(row: Mapping[str, Any]) -> str:
    """That a recovery broke down, what is exported instead, and what to try."""
    kept = (
        f"the best state before, of step {row['best_step']}, is taken"
        if row["taken"] == "yes"
        else "what was there before it is kept"
    )
    scales = row["what"] != "weights"
    way = "--learn none" if scales else f"--rate {lower_rate(row['rate'])}"
    return f"{row['what']}: {row['broke']}; {kept}. Try {way}, with another --out"


def _formats(plan: Plan) -> dict[str, Any]:
    """How many layers have which format, where layers have formats of their own."""
    counts = Counter(plan.specs.values())
    rows = [{"format": text, "layers": n} for text, n in sorted(counts.items())]
    return {"formats": rows} if rows else {}


def _with_last_step(learned: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What recovery adds, the exported file's quality as the last row of its steps."""
    if "steps" not in learned:
        return dict(learned)
    shown = [key for key in learned["steps"][-1] if key != "step"]
    last = {"step": "exported", **{key: after[key] for key in shown if key in after}}
    return {**learned, "steps": [*learned["steps"], last]}


def score(quality: Mapping[str, Any]) -> float:
    """What plans are chosen by: the user's own measure, else closeness to the original."""
    if "evaluate" in quality:
        return float(quality["evaluate"])
    for key, sign in (("mean_kld", -1.0), ("relative_error", -1.0)):
        if key in quality:
            value = quality[key]
            return sign * float(value["value"] if isinstance(value, Mapping) else value)
    raise LookupError("a quality without anything to compare by")


def _relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double(), wanted.double().cpu()
    if found.shape != wanted.shape:
        return float("inf")
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
