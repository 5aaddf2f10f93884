"""The tables of the benchmarks on networks; rendered by tables.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = tuple[str, ...]
Table = tuple[tuple[str, ...], list[Row], tuple[int, ...]]
"""(head, rows, columns that are text)."""


def read(folder: Path, name: str) -> Any:
    path = folder / name / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def patterns(folder: Path) -> tuple[str, Table] | None:
    """(a sentence, table): each pattern, ours and torch-pruning."""
    found = read(folder, "patterns")
    if not found:
        return None
    rows = [
        (r["name"].replace("_", " "), r["lighten"], _share(r["lighten_parameters"]),
         r["torch_pruning"], _share(r["torch_pruning_parameters"]))
        for r in found["rows"]
    ]  # fmt: skip
    text = (
        f"Of {found['patterns']} networks, equal to the masked one: lighten"
        f" {found['lighten_right']}, torch-pruning {found['torch_pruning_right']}."
    )
    head = ("network", "lighten", "parameters left", "torch-pruning", "parameters left")
    return text, (head, rows, (0, 1, 3))


def resnet56(folder: Path) -> tuple[str, Table] | None:
    """Accuracy by how far the MACs are divided."""
    found = read(folder, "resnet56_macs")
    if not found:
        return None
    keys = ("lighten", "lighten_streams", "lighten_uniform", "torch_pruning_bn", "torch_pruning")
    rows = [
        (f"{r['factor']:g}", f"{r['lighten_macs'] / 1e6:.1f}",
         *(fine(r.get(k)) for k in keys), f"{r['torch_pruning_macs'] / 1e6:.1f}",
         f"{r['lighten_seconds']:.0f}")
        for r in found["rows"]
    ]  # fmt: skip
    text = (
        f"Unpruned: {fine(found['accuracy'])}, {found['macs'] / 1e6:.1f} M MACs;"
        f" {found['test_images']:,} test images, {found['calibration_images']:,} to calibrate on."
        f" Analysis of the network {found['analysis_seconds']:.1f} s, curves of all axes"
        f" {found['curves_seconds']:.0f} s, both once; seconds: widths and compensation."
    )
    head = ("MACs ÷", "M MACs", "lighten", "streams too", "uniform",
            "torch-pruning + batch norms", "torch-pruning", "its M MACs", "s")  # fmt: skip
    return text, (head, rows, ())


def efficientnet(folder: Path) -> tuple[str, Table] | None:
    """Agreement, noise, size and latency of each int8 file."""
    found = read(folder, "efficientnet_int8")
    if not found:
        return None
    base = found["rows"]["float"]["p50_ms"]
    rows = []
    for name, r in found["rows"].items():
        # NNCF's file is timed by OpenVINO, whose float speed is another
        ratio = f"{r['p50_ms'] / base:.2f}" if "p50_ms" in r and name != "nncf" else ""
        rows.append(
            (name.replace("_", " "), _percent(_value(r, "top1_agreement")),
             _number(_value(r, "mean_kld"), 4), _number(_value(r, "sqnr_db"), 1),
             _number(r.get("bytes", 0) / 1e6, 2), _number(r.get("p50_ms"), 2),
             _number(r.get("p90_ms"), 2), _number(r.get("p99_ms"), 2), ratio,
             _number(r.get("peak_memory_bytes", 0) / 1e6 or None, 0),
             _number(r.get("seconds"), 0))
        )  # fmt: skip
    text = (
        f"{found['test']} photos measured, {found['calibration']} calibrated on,"
        f" {found['threads']} thread."
    )
    head = ("", "top-1 as float", "KLD", "SQNR, dB", "MB", "p50, ms", "p90", "p99", "÷ float",
            "peak MB", "made in, s")  # fmt: skip
    return text, (head, rows, (0,))


def learned_rounding(folder: Path) -> tuple[str, Table] | None:
    """Agreement with its interval, divergence and noise: what learning adds to the sweep."""
    found = read(folder, "learned_rounding")
    if not found:
        return None
    rows = [
        (name.replace("_", " "), _percent(_value(r, "top1_agreement")),
         " to ".join(_percent(r["top1_agreement"][end]) for end in ("low", "high")),
         _number(_value(r, "mean_kld"), 3), _number(_value(r, "sqnr_db"), 2),
         _number(r.get("bytes", 0) / 1e6, 2), _number(r.get("seconds"), 0))
        for name, r in found["rows"].items()
    ]  # fmt: skip
    text = (
        f"{found['test']} photos measured in onnxruntime, {found['threads']} thread;"
        f" {found['steps']} steps at a rate of {found['rate']:g}."
    )
    head = ("", "top-1 as float", "95 % interval", "KLD", "SQNR, dB", "MB", "made in, s")
    return text, (head, rows, (0, 2))


def sparse_integers(folder: Path) -> tuple[str, Table] | None:
    """What was removed -> accuracy and bytes, lighten and its peer side by side."""
    found = read(folder, "sparse_integers")
    if not found:
        return None
    original, *others = found["rows"]
    peers = {r["sparsity"]: r for r in others if r["way"] != "lighten"}
    rows = []
    for r in others:
        if r["way"] != "lighten":
            continue
        peer = peers[r["sparsity"]] if not r["recover"] else {}
        rows.append((
            r["sparsity"] or "none", r["recover"] or "", fine(r["accuracy"]),
            fine(peer.get("accuracy")), _kb(r, "checkpoint_bytes"), _kb(r, "onnx_bytes"),
            _kb(r, "onnx_packed"), _kb(peer, "onnx_packed"),
            f"{original['onnx_bytes'] / r['checkpoint_bytes']:.1f}",
        ))  # fmt: skip
    text = (
        f"As float32: {fine(original['accuracy'])}, {_kb(original, 'onnx_bytes')} kB as ONNX."
        f" {found['test_images']:,} test images in onnxruntime, {found['calibration']:,} to"
        " calibrate on."
    )
    head = ("removed", "recovered", "lighten int8", "peer int8", "checkpoint, kB", "ONNX, kB",
            "ONNX zipped, kB", "peer's zipped, kB", "float ONNX ÷ checkpoint")  # fmt: skip
    return text, (head, rows, (0, 1))


def _kb(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key] / 1000:.0f}" if key in row else ""


def half_latency(folder: Path) -> tuple[str, Table] | None:
    """Before, after and their ratio."""
    found = read(folder, "half_latency")
    if not found:
        return None
    rows = [
        (r["network"], r["quantize"], _number(r["before_ms"], 3), _number(r["after_ms"], 3),
         _number(r["ratio"], 3), _percent(_value(r, "reference_accuracy")),
         _percent(_value(r, "accuracy")), _percent(_value(r, "top1_agreement")),
         _number(r["macs"] / r["before_macs"], 2), _number(r["seconds"], 0))
        for r in found
    ]  # fmt: skip
    head = ("network", "quantize", "p50 before, ms", "after", "ratio", "accuracy before", "after",
            "top-1 as before", "MACs left", "made in, s")  # fmt: skip
    return "Timed in turns after the run.", (head, rows, (0, 1))


def _value(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    return value["value"] if isinstance(value, Mapping) else value


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def fine(value: float | None) -> str:
    """A share in percent, to a hundredth."""
    return "" if value is None else f"{100 * value:.2f} %"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
