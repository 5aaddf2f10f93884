"""Recovery: losses and held-out values over the steps of a training, and what each step brought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lighten.report.facts import Facts, History
from lighten.report.figures import Figure, axis, colour, known, rounded, word
from lighten.report.units import interval, significant, text, value_of

POINTS = 400
"""Points that a curve is drawn with; of longer ones, means of neighbours."""

_LABELS = {"steps": "steps_made", "held_out": "held_out_count"}
_OTHERS = {"step", "loss", "rate", "held_out"}


@dataclass(frozen=True)
class Learning:
    """One training. evaluations: the numbers of the held-out curve, (step, value)."""

    name: str
    loss: Figure
    held_out: Figure | None
    evaluations: list[tuple[str, str]]


def learning(facts: Facts) -> list[Learning]:
    """One for each history that has losses in it."""
    found = [
        _one(history, _told(facts.metrics, "scales" in history.name.split("-")))
        for history in facts.histories
    ]
    return [made for made in found if made is not None]


def steps(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Keys of quantities, and for each step of a run its name and its quantities."""
    rows = [row for row in metrics.get("steps") or () if isinstance(row, Mapping)]
    keys = list(dict.fromkeys(k for row in rows for k in row if k != "step"))
    table = [
        [known("step", str(row.get("step", ""))),
         *({"text": text(k, row.get(k)), "interval": interval(k, row.get(k))} for k in keys)]
        for row in rows
    ]  # fmt: skip
    return keys, table


def told(metrics: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What metrics.json says of the training, as (key of the label, text or phrase)."""
    found = _told(metrics)
    rows: list[tuple[str, Any]] = []
    for key in ("length", "steps", "best_step", "learn_from", "rate", "examples", "tokens",
                "held_out", "mode", "trained", "minutes", "seconds", "taken"):  # fmt: skip
        value = found.get(key)
        if value is None:
            continue
        label = f"learn.{_LABELS.get(key, key)}"
        if key in ("taken", "mode"):
            rows.append((label, known(label, str(value))))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            rows.append((label, f"{value:,}" if isinstance(value, int)
                         else significant(value)))  # fmt: skip
        else:
            rows.append((label, str(value)))
    return rows


def _told(metrics: Mapping[str, Any], scales: bool = False) -> Mapping[str, Any]:
    """What was learned first; scales: by the integers, which learn last."""
    at = -1 if scales else 0
    for key in ("recover", "learning"):
        rows = metrics.get(key)
        if isinstance(rows, list) and rows and isinstance(rows[at], Mapping):
            return dict(rows[at])
    return {}


def _one(history: History, told: Mapping[str, Any]) -> Learning | None:
    rows = [r for r in history.rows if value_of(r.get("step")) is not None]
    losses = [r for r in rows if value_of(r.get("loss")) is not None]
    if not losses:
        return None
    x = [value_of(r["step"]) or 0.0 for r in losses]
    parts = list(dict.fromkeys(
        k for r in losses for k in r if k not in _OTHERS and value_of(r.get(k)) is not None
    ))  # fmt: skip
    traces = [_line(x, [r.get("loss") for r in losses], word("learn.loss"), "after", 2.0)]
    if len(parts) > 1:
        for number, part in enumerate(parts[:5]):
            values = [r.get(part) for r in losses]
            traces.append(_line(x, values, part.replace("_", " "), f"run{number % 6}", 1.2))
    layout = {"height": 280, "xaxis": axis(word("learn.step")), "yaxis": axis(word("learn.loss"))}
    layout["showlegend"] = len(traces) > 1
    held = [r for r in rows if value_of(r.get("held_out")) is not None]
    figure, table = _held_out(held, told)
    return Learning(history.name, {"data": traces, "layout": layout}, figure, table)


def _held_out(
    rows: Sequence[Mapping[str, Any]], told: Mapping[str, Any]
) -> tuple[Figure | None, list[tuple[str, str]]]:
    """What the best state was chosen by: a divergence is stored negated, higher being better."""
    if not rows:
        return None, []
    values = [value_of(r["held_out"]) or 0.0 for r in rows]
    measure = str(told.get("measure") or "")
    down = max(values) <= 0 and min(values) < 0
    if down:
        values = [-v for v in values]
        measure = measure or "mean_kld"
    if measure == "accuracy":
        values = [100 * v for v in values]
    label = word(f"row.{measure}") if measure else word("learn.value")
    label += {"accuracy": ", %", "mean_kld": ", nats"}.get(measure, "")
    x = [value_of(r["step"]) or 0.0 for r in rows]
    best = (min if down else max)(range(len(values)), key=values.__getitem__)
    traces = [
        {**_line(x, values, word("learn.held_out"), "after", 2.0), "mode": "lines+markers"},
        {
            "type": "scatter", "mode": "markers", "x": [x[best]], "y": rounded([values[best]]),
            "name": word("learn.best"), "hovertemplate": "%{x}: %{y}<extra></extra>",
            "marker": {"symbol": "star", "size": 14, "color": colour("other")},
        },
    ]  # fmt: skip
    layout = {
        "height": 280, "xaxis": axis(word("learn.step")), "yaxis": axis(label), "showlegend": True,
    }  # fmt: skip
    table = [(f"{step:,.0f}", significant(v, 4)) for step, v in zip(x, values, strict=True)]
    return {"data": traces, "layout": layout}, table[-50:]


def _line(
    x: Sequence[float], y: Sequence[Any], name: str, tint: str, width: float
) -> dict[str, Any]:
    pairs = [(a, v) for a, b in zip(x, y, strict=True) if (v := value_of(b)) is not None]
    by = -(-len(pairs) // POINTS) or 1
    groups = [pairs[i : i + by] for i in range(0, len(pairs), by)]
    return {
        "type": "scatter", "mode": "lines", "name": name,
        "x": rounded([group[-1][0] for group in groups], 8),
        "y": rounded([sum(v for _, v in group) / len(group) for group in groups]),
        "line": {"color": colour(tint), "width": width},
        "hovertemplate": "%{x}: %{y:.4g}<extra></extra>",
    }  # fmt: skip
