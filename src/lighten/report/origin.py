"""Provenance: how the same result is made again, and what it cost."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from lighten.progress import duration
from lighten.report.facts import Facts
from lighten.report.figures import known
from lighten.report.units import text, value_of

_HIDDEN = {"inputs", "source"}


def command(facts: Facts) -> str:
    """The command line; where the run did not keep it, what its request says."""
    told = facts.part("provenance").get("command")
    if isinstance(told, list):
        return shlex.join(str(word) for word in told)
    return str(told) if told else ""


def origin(facts: Facts) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of (name, value): the model, the data, what was asked, versions, the machine."""
    told = facts.part("provenance")
    groups: list[tuple[str, list[tuple[str, str]]]] = []
    for key in ("model", "data"):
        value = told.get(key)
        if value is None and key in facts.request:
            value = {"source": facts.request.get("source") if key == "model"
                     else facts.metrics.get("data"), "digest": facts.request[key]}  # fmt: skip
        if rows := _pairs(value, key):
            groups.append((f"origin.{key}", rows))
    asked = {k: v for k, v in facts.request.items() if k not in {"model", "data", *_HIDDEN}}
    if "seed" in told:
        asked.setdefault("seed", told["seed"])
    if rows := _pairs(asked, ""):
        groups.append(("origin.request", rows))
    for key in ("versions", "machine"):
        if rows := _pairs(told.get(key), key):
            groups.append((f"origin.{key}", rows))
    times = {k: told[k] for k in ("began", "ended") if told.get(k) is not None}
    if rows := _pairs(times, ""):
        groups.append(("origin.times", rows))
    return groups


def stages(facts: Facts) -> list[dict[str, Any]]:
    """Each stage with its time, its share of the longest, and the peak memory."""
    times = [value_of(row.get("seconds")) or 0.0 for row in facts.stages]
    longest = max(times, default=0.0)
    return [
        {
            "stage": known("stage", str(row.get("stage", ""))),
            "time": duration(seconds),
            "share": seconds / longest if longest else 0.0,
            "memory": text("bytes", row["peak_memory_bytes"])
            if value_of(row.get("peak_memory_bytes"))
            else "–",
        }
        for row, seconds in zip(facts.stages, times, strict=True)
    ]


def total(facts: Facts) -> str:
    """The time of all stages."""
    return duration(sum(value_of(row.get("seconds")) or 0.0 for row in facts.stages))


def _pairs(value: Any, name: str) -> list[tuple[str, str]]:
    """A mapping as rows of text; nested ones by dotted names; what is unset is left out."""
    if not isinstance(value, Mapping):
        return [] if value in (None, "", [], {}) else [(name, _text(value))]
    rows: list[tuple[str, str]] = []
    for key, inner in value.items():
        label = str(key).replace("_", " ")
        if isinstance(inner, Mapping):
            rows += [(f"{label} {k}", v) for k, v in _pairs(inner, "")]
        elif inner not in (None, "", []):
            shown = text(str(key), inner) if str(key).endswith("bytes") else _text(inner)
            if isinstance(inner, int) and not isinstance(inner, bool) and inner >= 10_000:
                shown = shown if str(key).endswith("bytes") else f"{inner:,}"
            rows.append((label, shown))
    return rows


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(inner) for inner in value)
    return str(value)
