"""The tables of the benchmarks in which a network learns; rendered by tables.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from network_tables import Table, fine, read


def recovery(folder: Path) -> tuple[str, Table] | None:
    """Accuracy before, after pruning, after recovery and as integers, a row a network."""
    found = read(folder, "recovery")
    if not found:
        return None
    rows = [
        (r["network"], f"{r['factor']:.2f}", fine(r["original"]), fine(r["pruned"]),
         fine(r["recovered"]), fine(r["float_onnxruntime"]), fine(r["int8_onnxruntime"]),
         fine(r["int8_learned_onnxruntime"]) if "int8_learned_onnxruntime" in r else "",
         f"{r['int8_bytes'] / 1e3:,.0f}", f"`{r['learn_from']}`",
         r["augment"], "twice" if r["mirrored"] else "once", r["optimizer"],
         _epochs(r), str(r["batch"]), f"{r['rate']:g}", str(r["seed"]),
         f"{r['minutes']:.0f}")
        for r in found
    ]  # fmt: skip
    first = found[0]
    twice = {r["network"]: r["original_mirrored"] for r in found if "original_mirrored" in r}
    text = (
        f"{first['test_images']:,} test images, {first['examples']:,} training images learned from;"
        f" moving average {first['average']}."
    )
    if twice:
        both = ", ".join(f"{name} {fine(value)}" for name, value in sorted(twice.items()))
        text += f" The mean of what an original says of an image and of its mirror image: {both}."
    head = ("network", "MACs ÷", "original", "pruned", "recovered", "float in onnxruntime",
            "int8 there", "scales learned", "its kB", "learned from", "augmented by",
            "teacher looks", "by", "epochs", "batch", "rate", "seed",
            "minutes of recovery")  # fmt: skip
    return text, (head, rows, (0, 9, 10, 11, 12))


def _epochs(row: dict[str, Any]) -> str:
    """How many; of a network that was pruned in two steps those after the first one too."""
    last: str = row["length"].removesuffix("epochs")
    if not row.get("first"):
        return last
    factor, length = row["first"]
    return f"{length.removesuffix('epochs')} at ÷ {factor}, {last}"


def student(folder: Path) -> tuple[str, Table] | None:
    """Mean accuracy by lesson, and the gain over labels alone."""
    found = read(folder, "student")
    if not found or not found.get("lessons"):
        return None
    rows = [
        (f"`{r['lesson']}`", str(r["seeds"]), fine(r["accuracy"]), _points(r["deviation"], ""),
         _points(r["gain"], "+"), ", ".join(_points(gain, "+") for gain in r["gains"]))
        for r in found["lessons"]
    ]  # fmt: skip
    text = f"{found['student']}, taught by {found['teacher']}, {found['epochs']} epochs."
    head = ("lesson", "seeds", "accuracy", "deviation", "over labels", "seed by seed")
    return text, (head, rows, (0, 5))


def recovery_memory(folder: Path) -> tuple[str, Table] | None:
    """Memory at rest and at its highest, with gradient checkpoints and without."""
    found = read(folder, "recovery_memory")
    if not found:
        return None
    plain = {r["mode"]: r for r in found["rows"] if not r["checkpoints"]}
    rows = [
        (r["mode"], "yes" if r["checkpoints"] else "no", f"{r['trained'] / 1e6:.1f}",
         _gb(r["rest_bytes"]), _gb(r["peak_bytes"]), _gb(r["peak_bytes"] - r["rest_bytes"]),
         f"{_more(r) / _more(plain[r['mode']]):.2f}", f"{r['processor_seconds_per_step']:.0f}")
        for r in found["rows"]
    ]  # fmt: skip
    text = (
        f"{found['model']}, `{found['format']}`; {found['steps']} steps of {found['tokens']:,}"
        f" tokens in windows of {found['window']}, one thread, torch {found['torch']}."
    )
    head = ("what learns", "checkpoints", "M numbers trained", "GB at rest", "GB at most",
            "GB more", "÷ without", "processor s a step")  # fmt: skip
    return text, (head, rows, (0, 1))


def _more(row: dict[str, Any]) -> float:
    more: float = row["peak_bytes"] - row["rest_bytes"]
    return more


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f}"


def learned_scales(folder: Path) -> tuple[str, Table] | None:
    """Divergence in llama.cpp before and after learning, at the same bytes."""
    found = read(folder, "learned_scales")
    if not found:
        return None
    plain = {
        (r["copy"], r["size"]): r["kld_mean"]
        for r in found
        if r["recipe"] == "none" and r["columns"] == "kept"
    }
    rows = [
        (r["copy"], f"{r['bytes'] / 1e6:.2f}", r["columns"], r["recipe"],
         str(r.get("block_steps", "")), str(r.get("steps", "")),
         f"{r['kld_mean']:.4f} ± {r['kld_mean_err']:.4f}",
         f"{100 * (r['kld_mean'] / plain[r['copy'], r['size']] - 1):+.1f} %",
         f"{r['ppl']:.2f}", f"{100 * r['top1']:.1f} %", str(r.get("minutes", "")),
         str(r.get("wall_minutes", "")))
        for r in found
    ]  # fmt: skip
    text = (
        "Change: from nothing learned, columns kept as they are. Minutes of steps alone; in all:"
        " with what errors cost and the text's way through the blocks, and for all rows that share"
        " blocks with the head."
    )
    head = ("copy", "MB", "columns", "what learned", "steps a block", "steps together", "KLD",
            "change", "perplexity", "top-1", "minutes of steps", "minutes in all")  # fmt: skip
    return text, (head, rows, (0, 2, 3))


def _points(value: float | None, sign: str) -> str:
    return "" if value is None else f"{100 * value:{sign}.2f}"
