"""Finished and unfinished runs as the pipelines leave them, made of JSON alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from lighten.atomic import dump
from lighten.run import Run

KINDS = ("text", "network")

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAA"
    "AABJRU5ErkJggg=="
)

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


def spread(value: float, half: float) -> dict[str, float]:
    """A quantity with its interval."""
    return {"value": value, "low": value - half, "high": value + half}


TEXT_METRICS: dict[str, Any] = {
    "before": {
        "bytes": 98_362_432, "bits_per_weight": 5.85, "perplexity": spread(17.23, 1.0),
        "load_seconds": 0.19, "prompt_tokens_per_second": 335.0,
        "generate_tokens_per_second": 97.0, "peak_memory_bytes": 196_096_000,
    },
    "after": {
        "bytes": 40_000_000, "bits_per_weight": 2.4, "perplexity": spread(17.85, 1.0),
        "perplexity_ratio": {"value": 1.036, "low": 0.993, "high": 1.088},
        "mean_kld": spread(0.073, 0.01), "p99_kld": spread(0.53, 0.1),
        "top1_agreement": spread(0.828, 0.05), "load_seconds": 0.19,
        "prompt_tokens_per_second": 572.0, "generate_tokens_per_second": 121.0,
        "peak_memory_bytes": 150_000_000,
    },
    "plan": "allocated", "predicted_kld": 0.04, "windows": 5, "tokens": 2555,
    "plans": [
        {"plan": "allocated", "chosen": "yes", "mean_kld": spread(0.073, 0.01)},
        {"plan": "uniform", "chosen": "", "mean_kld": spread(0.178, 0.02)},
    ],
    "notes": ["calibrated on a short text"], "problems": [], "data": "built-in text",
}  # fmt: skip

NETWORK_METRICS: dict[str, Any] = {
    "before": {
        "parameters": 853_018, "macs": 125_485_696, "bytes": 3_425_350, "p50_ms": 2.319,
        "p99_ms": 2.57, "peak_memory_bytes": 77_774_848, "accuracy": spread(0.9339, 0.005),
    },
    "after": {
        "parameters": 469_576, "macs": 59_425_408, "bytes": 1_893_496, "p50_ms": 1.638,
        "p99_ms": 1.816, "peak_memory_bytes": 70_967_296, "accuracy": spread(0.9329, 0.005),
        "accuracy_change": {"value": -0.001, "low": -0.003, "high": 0.001},
        "top1_agreement": spread(0.9368, 0.005), "mean_kld": spread(0.2028, 0.016),
    },
    "examples": 10000, "calibrated_on": 1024, "data": "cifar10/train.parquet",
    "plan": "allocated",
    "plans": [
        {"plan": "allocated", "chosen": "yes", "macs": 59_425_408,
         "accuracy": spread(0.9329, 0.005), "accuracy_change": spread(-0.001, 0.002)},
        {"plan": "uniform", "chosen": "", "macs": 58_374_784,
         "accuracy": spread(0.9199, 0.005), "accuracy_change": spread(-0.014, 0.002)},
    ],
    "widths": [{"axis": "conv1.weight", "units": 12}], "notes": [], "problems": [],
}  # fmt: skip


def changed(metrics: dict[str, Any], side: str, **values: Any) -> dict[str, Any]:
    """Metrics with other values on one side."""
    copy = deepcopy(metrics)
    copy[side] |= values
    return copy


def layers(count: int, name: str = "blocks.{block}.{kind}.weight") -> list[dict[str, Any]]:
    """Layers of a network, with everything that a panel shows."""
    kinds = ("q", "k", "v", "o", "up", "down")
    rows = []
    for number in range(count):
        block, kind = divmod(number, len(kinds))
        edges = [i / 16 - 1 for i in range(33)]
        before = [max(0, 16 - abs(i - 16)) * 10 for i in range(32)]
        rows.append(
            {
                "name": name.format(block=block, kind=kinds[kind]), "block": block,
                "kind": "linear", "shape": [64, 64 + number], "format": "q4_k",
                "parameters_before": 4096, "parameters_after": 4096, "bits": 4.5,
                "bytes_before": 8192 + 64 * number, "bytes_after": 2304 + 10 * number,
                "macs_before": 4096, "macs_after": 4096, "width": None, "sparsity": None,
                "sensitivity": 1e-4 * (1 + (7 * number) % 13), "error": 0.01 * (1 + number % 5),
                "error_kind": "output", "grid": [i / 8 - 1 for i in range(16)],
                "histogram": {"edges": edges, "before": before, "after": before[::-1]},
                "importance": {"scores": [1 / (1 + i) for i in range(16)],
                               "kept": [1] * 12 + [0] * 4},
                "range": {"low": -2.5, "high": 3.0, "method": "mse", "bits": 8},
            }
        )  # fmt: skip
    return rows


def look(kind: str, count: int = 12) -> dict[str, Any]:
    """What run/look holds, of either kind of run."""
    found: dict[str, Any] = {
        "layers": layers(count),
        "axes": [
            {"name": "blocks.0.up.weight", "size": 16, "kept": 12, "locked": None,
             "writers": ["blocks.0.up.weight"], "readers": ["blocks.0.down.weight"],
             "macs_share": 0.2},
            {"name": "blocks.0.q.weight", "size": 64, "kept": 64,
             "locked": "an operator without a rule", "writers": ["blocks.0.q.weight"],
             "readers": [], "macs_share": None},
        ],
        "curve": [
            {"plan": "original", "source": "original", "measured": True, "bytes": 98e6,
             "macs": 2e8, "mean_kld": 0.0, "top1_agreement": 1.0},
            {"plan": "allocated", "source": "this plan", "measured": True, "bytes": 80e6,
             "macs": 1e8, "mean_kld": spread(0.073, 0.03), "top1_agreement": spread(0.83, 0.07)},
            {"plan": "uniform", "source": "uniform", "measured": True, "bytes": 79e6,
             "macs": 1.1e8, "mean_kld": spread(0.178, 0.05), "top1_agreement": 0.75},
            {"plan": "60MB", "source": "other budget", "measured": False, "bytes": 60e6,
             "macs": 0.8e8, "mean_kld": 0.3},
        ],
        "provenance": {
            "command": ["lighten", "compress", "model.gguf", "--budget", "80 MB"],
            "model": {"source": "model.gguf", "digest": "1aa8"}, "data": {"source": "built-in"},
            "seed": 0, "versions": {"lighten": "0.1.0", "torch": "2.13.0"},
            "machine": {"cpu": "x86-64", "cores": 2},
            "stages": [{"stage": "candidates", "seconds": 41.0, "peak_memory_bytes": 1.4e9},
                       {"stage": "exports", "seconds": 3.0, "peak_memory_bytes": 1.4e9}],
            "began": "2026-01-01 10:00:00", "ended": "2026-01-01 10:01:00",
        },
    }  # fmt: skip
    if kind == "text":
        found["differences"] = {
            "kind": "text",
            "windows": [
                {"mean_kld": 0.3, "start": 0, "tokens": ["The", " cat", "\n", " sat"],
                 "kld": [0.01, 1.7, 0.0, 0.2]},
                {"mean_kld": 0.1, "start": 9, "tokens": ["A", " dog"], "kld": [0.1, 0.05]},
            ],
            "continuation": {"prompt": "Say hello.", "before": "Hello!", "after": "Hi!"},
        }  # fmt: skip
    else:
        found["differences"] = {
            "kind": "images", "classes": ["cat", "dog"],
            "confusion": {"before": [[90, 10], [5, 95]], "after": [[85, 15], [4, 96]]},
            "worst": [{"png": PIXEL, "label": 0, "before": 0, "after": 1,
                       "before_probability": 0.9, "after_probability": 0.8, "kld": 2.1}],
        }  # fmt: skip
    return found


def request(kind: str) -> dict[str, Any]:
    """What a run of that kind was asked for."""
    common = {"model": "1aa8", "data": "8ea6", "budget": "80MB"}
    if kind == "text":
        return {**common, "export": "gguf", "samples": 64, "length": 512, "seed": 0,
                "source": "models/tiny.gguf"}  # fmt: skip
    return {**common, "export": "onnx", "source": "models.py:resnet56", "quantize": "auto",
            "inputs": [[2, 3, 32, 32]]}  # fmt: skip


def make_run(
    folder: Path,
    kind: str = "text",
    *,
    metrics: Mapping[str, Any] | None = None,
    finished: bool = True,
    shown: Mapping[str, Any] | None = None,
    history: bool = False,
) -> Path:
    """A run directory. shown: of run/look, everything where it is None."""
    measured = metrics or (TEXT_METRICS if kind == "text" else NETWORK_METRICS)
    with Run.open(folder, request(kind)) as run:
        if kind == "text":
            run.append("candidates", candidates())
        specs = {"a.10.weight": "q4_k@gptq", "a.2.weight": "keep"}
        plan = {"specs": specs, "widths": {}, "predicted": {}}
        run.json("plan", lambda: plan)
        for name, value in (look(kind) if shown is None else shown).items():
            run.json(f"look/{name}", lambda value=value: value)
        if history:
            rows = [{"step": i, "loss": 1 / i, "rate": 0.1} for i in range(1, 21)]
            rows[-1]["held_out"] = -0.02
            rows[9]["held_out"] = -0.05
            place = folder / "recover" / "learning"
            place.mkdir(parents=True)
            (place / "history.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        if finished:
            run.json("metrics", lambda: dict(measured))
    return folder


def candidates() -> list[dict[str, Any]]:
    """Of two layers, the ways to store each."""
    return [
        {"unit": layer, "specs": {layer: spec}, "error": error, "cost": {"bytes": size}}
        for layer in ("a.10.weight", "a.2.weight")
        for spec, error, size in (("keep", 0.0, 1000.0), ("q4_k@gptq", 0.01, 300.0))
    ]


def rewrite(folder: Path, name: str, value: Any) -> None:
    """Put another value in a file that the manifest no longer vouches for."""
    (folder / name).write_text(value if isinstance(value, str) else dump(value))
