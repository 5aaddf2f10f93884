"""The model map: every layer in order, what was done to it, and how much it matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lighten.report.facts import Facts
from lighten.report.figures import Figure, known
from lighten.report.layer_charts import blocks, histogram, importance, short, treemap
from lighten.report.units import NBSP, significant, text, value_of
from lighten.report.words import Phrase

GROWN = 1.005
"""Share of its bytes from which on a layer has become larger."""

_KEPT = {"keep", "none", ""}


@dataclass(frozen=True)
class Map:
    """rows: for the table. panels: what opens on a click, one for each row. columns: of the table
    that have anything in them."""

    rows: list[dict[str, Any]]
    panels: list[dict[str, Any]]
    columns: set[str]
    treemap: dict[str, Figure]
    blocks: Figure | None
    blocks_table: list[dict[str, Any]]
    grown: bool = False


def layer_map(facts: Facts) -> Map | None:
    """None where nothing is known of the layers."""
    layers = [la for la in facts.rows("layers") if isinstance(la.get("name"), str)]
    if not layers:
        return None
    rows = [_row(number, layer) for number, layer in enumerate(layers, 1)]
    columns = {key for row in rows for key, cell in row["cells"].items() if cell["sort"] != ""}
    panels = [_panel(layer, facts.rows("axes")) for layer in layers]
    bars, table = blocks(layers)
    sides = [s for s in ("after", "before") if any(value_of(la.get(f"bytes_{s}")) for la in layers)]
    trees = {side: treemap(layers, side) for side in sides}
    grown = any((row["share"] or 0) > GROWN for row in rows)
    return Map(rows, panels, columns, trees, bars, table, grown)


def done_to(layer: Mapping[str, Any]) -> list[Phrase | str]:
    """What was done to a layer, one phrase for each thing; a name of a format stands for itself."""
    found: list[Phrase | str] = []
    width = layer.get("width")
    if isinstance(width, Mapping):
        kept, of = value_of(width.get("kept")), value_of(width.get("of"))
        if kept is not None and of is not None and kept < of:
            found.append(Phrase("done.width", {"kept": f"{kept:g}", "of": f"{of:g}"}))
    if sparsity := value_of(layer.get("sparsity")):
        found.append(Phrase("done.sparsity", {"x": f"{100 * sparsity:.0f}{NBSP}%"}))
    if rank := value_of(layer.get("rank")):
        found.append(Phrase("done.rank", {"x": f"{rank:g}"}))
    name = str(layer.get("format") or "")
    if name.lower() not in _KEPT:
        same = layer.get("bytes_before") is not None and (
            layer.get("bytes_before") == layer.get("bytes_after")
        )
        if not (same and name in ("f32", "f16", "bf16")):
            found.append(name)
    elif name.lower() == "keep" and not found:
        found.append(Phrase("done.kept"))
    return found


def _row(number: int, layer: Mapping[str, Any]) -> dict[str, Any]:
    before, after = value_of(layer.get("bytes_before")), value_of(layer.get("bytes_after"))
    left = after / before if before and after is not None else None
    done = done_to(layer)
    sort = str(done[0].key if isinstance(done[0], Phrase) else done[0]) if done else ""
    cells = {
        "done": {"sort": sort or ("-" if "format" in layer else "")},
        "bits": _cell("bits", layer.get("bits")),
        "before": _cell("bytes", before),
        "after": _cell("bytes", after),
        "left": {"sort": "" if left is None else f"{left:.6g}",
                 "text": "" if left is None else f"{100 * left:.0f}{NBSP}%"},
        "macs": _cell("macs", layer.get("macs_after", layer.get("macs_before"))),
        "sensitivity": _cell("kld", layer.get("sensitivity")),
        "error": _cell("relative_error", layer.get("error")),
    }  # fmt: skip
    return {
        "number": number,
        "name": layer["name"],
        "short": short(str(layer["name"])),
        "kind": known("kind", str(layer.get("kind") or "")),
        "shape": _shape(layer.get("shape")),
        "done": done or [Phrase("done.nothing")],
        "left": None if left is None else min(1.0, left),
        "share": left,
        "cells": cells,
    }


def _cell(key: str, quantity: Any) -> dict[str, str]:
    value = value_of(quantity)
    if value is None:
        return {"sort": "", "text": ""}
    shown = significant(value) if key in ("kld", "bits") else text(key, quantity)
    return {"sort": f"{value:.8g}", "text": shown}


def _shape(shape: Any) -> str:
    if not isinstance(shape, (list, tuple)):
        return ""
    return f"{NBSP}×{NBSP}".join(str(side) for side in shape)


def _panel(layer: Mapping[str, Any], axes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What opens on a click: facts as (key of the label, text or phrase), charts, its axes."""
    name = str(layer["name"])
    facts: list[tuple[str, Any]] = [("layer.kind", known("kind", str(layer.get("kind") or "–")))]
    if shape := _shape(layer.get("shape")):
        facts.append(("layer.shape", shape))
    facts += [("layer.done", part) for part in done_to(layer)]
    for key, label in (("bytes", "layer.bytes"), ("parameters", "layer.parameters"),
                       ("macs", "layer.macs")):  # fmt: skip
        sides = [layer.get(f"{key}_{side}") for side in ("before", "after")]
        both = [text(key, side) for side in sides if value_of(side) is not None]
        if both:
            facts.append((label, " → ".join(dict.fromkeys(both))))
    if (bits := value_of(layer.get("bits"))) is not None:
        facts.append(("layer.bits", significant(bits)))
    if (found := value_of(layer.get("sensitivity"))) is not None:
        facts.append(("layer.sensitivity", f"{significant(found)}{NBSP}nats"))
    if (found := value_of(layer.get("error"))) is not None:
        kind = known("error_kind", str(layer.get("error_kind") or ""))
        shown = significant(found)
        facts.append(("layer.error", Phrase("layer.error_of", {"x": shown, "kind": kind})
                      if kind else shown))  # fmt: skip
    limits = layer.get("range")
    if isinstance(limits, Mapping):
        facts.append(("layer.range", _range(limits)))
    charts = {"histogram": histogram(layer), "importance": importance(layer)}
    writes = [a["name"] for a in axes if name in (a.get("writers") or ())]
    reads = [a["name"] for a in axes if name in (a.get("readers") or ())]
    return {
        "name": name, "facts": facts, "charts": {k: v for k, v in charts.items() if v},
        "writes": writes, "reads": reads,
    }  # fmt: skip


def _range(limits: Mapping[str, Any]) -> str | Phrase:
    low, high = value_of(limits.get("low")), value_of(limits.get("high"))
    if low is None or high is None:
        return "–"
    places = {"low": significant(low), "high": significant(high)}
    method, bits = limits.get("method"), value_of(limits.get("bits"))
    if not method or bits is None:
        return f"{places['low']} … {places['high']}"
    return Phrase("layer.range_of", {**places, "method": str(method), "bits": f"{bits:g}"})
