"""The tables of the benchmarks in which a network learns; rendered by tables.py."""

from __future__ import annotations

from pathlib import Path

from network_tables import Table, fine, read


def recovery(folder: Path) -> tuple[str, Table] | None:
    """Accuracy before, after pruning, after recovery and as integers, a row a network."""
    found = read(folder, "recovery")
    if not found:
        return None
    rows = [
        (r["network"], f"{r['factor']:.2f}", fine(r["original"]), fine(r["pruned"]),
         fine(r["recovered"]), fine(r["float_onnxruntime"]), fine(r["int8_onnxruntime"]),
         f"{r['int8_bytes'] / 1e3:,.0f}", r["length"], f"{r['rate']:g}", f"{r['minutes']:.0f}")
        for r in found
    ]  # fmt: skip
    first = found[0]
    text = (
        f"{first['test_images']:,} test images, {first['examples']:,} training images learned from;"
        f" learned from `{first['learn_from']}`, moving average {first['average']}."
    )
    head = ("network", "MACs ÷", "original", "pruned", "recovered", "float in onnxruntime",
            "int8 there", "its kB", "length", "rate", "minutes of recovery")  # fmt: skip
    return text, (head, rows, (0, 8))


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


def _points(value: float | None, sign: str) -> str:
    return "" if value is None else f"{100 * value:{sign}.2f}"
