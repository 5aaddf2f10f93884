"""The trade-off curve: what is lost against bytes, multiply-adds and milliseconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lighten.report.facts import Facts
from lighten.report.figures import (
    Figure,
    axis,
    colour,
    known,
    marked,
    plain,
    rounded,
    scale,
    word,
)
from lighten.report.units import ends_of, text, value_of
from lighten.report.words import Phrase

COSTS = ("bytes", "macs", "p50_ms")
Point = Mapping[str, Any]
"""A row of look/curve.json."""

QUALITIES = ("accuracy", "evaluate", "mean_kld", "top1_agreement", "perplexity")
SHARES = ("accuracy", "top1_agreement")
UNITS = {"bytes": ("B", "kB", "MB", "GB"), "macs": ("", "k", "M", "G"), "p50_ms": ("ms", "s")}

_LOOKS: Mapping[str, Mapping[str, Any]] = {
    "this plan": {"symbol": "star", "size": 17, "color": "after"},
    "other budget": {"symbol": "circle", "size": 9, "color": "after"},
    "uniform": {"symbol": "square", "size": 9, "color": "other"},
    "peer": {"symbol": "triangle-up", "size": 11, "color": "peer"},
    "original": {"symbol": "diamond", "size": 11, "color": "before"},
}


@dataclass(frozen=True)
class Curve:
    """figures: by "cost|quality". costs, qualities: what can be chosen, that which says of most
    plans first. rows: the numbers."""

    figures: dict[str, Figure]
    costs: list[str]
    qualities: list[str]
    rows: list[dict[str, Any]]


def curve(facts: Facts) -> Curve | None:
    """None where nothing can be set against anything."""
    return curve_of(points_of(facts))


def curve_of(points: Sequence[Point], names: Sequence[str] = ()) -> Curve | None:
    """names: of each point's run, where several are compared."""
    pairs = drawable(points)
    if not pairs:
        return None
    figures = {
        f"{cost}|{quality}": figure(
            [points[i] for i in here], cost, quality, [names[i] for i in here] if names else ()
        )
        for (cost, quality), here in pairs.items()
    }
    costs = list(dict.fromkeys(cost for cost, _ in pairs))
    counts = Counter[str]()
    for (_, quality), here in pairs.items():
        counts[quality] = max(counts[quality], len(here))
    qualities = sorted(counts, key=lambda q: (-counts[q], QUALITIES.index(q)))
    rows = [
        {**row_of(p, costs, qualities), **({"run": names[i]} if names else {})}
        for i, p in enumerate(points)
        if any(value_of(p.get(cost)) is not None for cost in COSTS)
    ]
    return Curve(figures, costs, qualities, rows)


def drawable(points: Sequence[Point]) -> dict[tuple[str, str], list[int]]:
    """(cost, quality) -> the points that have both, where they are not all at one place; the pair
    that says of most points first, and of equal ones in the order of COSTS and QUALITIES."""
    found = {}
    for cost in COSTS:
        for quality in QUALITIES:
            here = [
                i for i, p in enumerate(points)
                if value_of(p.get(cost)) is not None and value_of(p.get(quality)) is not None
            ]  # fmt: skip
            if len({value_of(points[i].get(cost)) for i in here}) > 1:
                found[cost, quality] = here
    return dict(sorted(found.items(), key=lambda pair: -len(pair[1])))


def figure(
    points: Sequence[Mapping[str, Any]], cost: str, quality: str, names: Sequence[str] = ()
) -> Figure:
    """names: of each point's run, where several are compared; each has its colour then."""
    largest = max(abs(value_of(p[cost]) or 0.0) for p in points)
    by, unit = scale(largest, UNITS[cost])
    percent = 100 if quality in SHARES else 1
    groups: dict[tuple[str, bool, str], list[Mapping[str, Any]]] = {}
    for number, point in enumerate(points):
        run = names[number] if names else ""
        source = source_of(point)
        groups.setdefault((source, bool(point.get("measured", True)), run), []).append(point)
    order = list(dict.fromkeys(names))
    traces = []
    for source in ("original", "other budget", "uniform", "peer", "this plan"):
        for (kind, measured, run), group in groups.items():
            if kind != source:
                continue
            look = _LOOKS[source]
            tint = f"run{order.index(run) % 6}" if run and source != "original" else look["color"]
            traces.append(
                _trace(group, cost, quality, by, percent, look, tint, measured, source, run)
            )
    title = word(f"row.{quality}") + (", %" if percent == 100 else "")
    if quality.endswith("kld"):
        title += ", nats"
    x = word(f"row.{cost}") + (f", {unit}" if unit else "")
    return {
        "data": traces,
        "layout": {"xaxis": axis(x), "yaxis": axis(title), "height": 420, "showlegend": True},
    }


def _trace(
    group: Sequence[Mapping[str, Any]], cost: str, quality: str, by: float, percent: int,
    look: Mapping[str, Any], tint: str, measured: bool, source: str, run: str,
) -> dict[str, Any]:  # fmt: skip
    group = sorted(group, key=lambda p: value_of(p[cost]) or 0.0)
    values = [percent * (value_of(p[quality]) or 0.0) for p in group]
    ends = [ends_of(p[quality]) for p in group]
    said = word("curve.measured" if measured else "curve.predicted")
    label = word(f"source.{source}")
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers" if source == "other budget" and len(group) > 1 else "markers",
        "x": rounded([(value_of(p[cost]) or 0.0) / by for p in group], 5),
        "y": rounded(values, 5),
        "name": f"{plain(run)}: {label}, {said}" if run else f"{label}, {said}",
        "text": [_hover(p, cost, quality) for p in group],
        "hovertemplate": "%{text}<br>" + said + "<extra></extra>",
        "line": {"color": colour(tint), "width": 1.5, "dash": "solid" if measured else "dot"},
        "marker": {
            "symbol": look["symbol"] + ("" if measured else "-open"),
            "size": look["size"],
            "color": colour(tint),
            "line": {"color": colour(tint) if not measured else colour("paper"), "width": 1.5},
        },
    }
    if any(ends):
        up = [0.0 if e is None else percent * e[1] - v for e, v in zip(ends, values, strict=True)]
        down = [0.0 if e is None else v - percent * e[0] for e, v in zip(ends, values, strict=True)]
        trace["error_y"] = {
            "type": "data", "symmetric": False, "array": rounded(up), "arrayminus": rounded(down),
            "color": colour(tint), "thickness": 1.2, "width": 4,
        }  # fmt: skip
    return trace


def _hover(point: Mapping[str, Any], cost: str, quality: str) -> str:
    name = marked("plan", str(point.get("plan", "")))
    lines = [f"{word(f'row.{k}')}: {text(k, point[k])}" for k in (cost, quality)]
    return "<br>".join([f"<b>{name}</b>", *lines])


def source_of(point: Point) -> str:
    """What kind of point it is; of an unknown one, a peer."""
    source = str(point.get("source", "peer"))
    return source if source in _LOOKS else "peer"


def row_of(
    point: Mapping[str, Any], costs: Sequence[str], qualities: Sequence[str]
) -> dict[str, Any]:
    """The numbers of a point, for the table below the chart."""
    return {
        "plan": known("plan", str(point.get("plan", ""))),
        "source": Phrase(f"source.{source_of(point)}"),
        "how": Phrase("curve.measured" if point.get("measured", True) else "curve.predicted"),
        "values": [text(k, point.get(k)) for k in (*costs, *qualities)],
    }


def points_of(facts: Facts) -> list[dict[str, Any]]:
    """What look/curve.json has, or the few points that metrics.json knows."""
    return facts.rows("curve") or _from_metrics(facts.metrics)


def _from_metrics(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points that metrics.json alone knows: the original, the result, the plans beside it."""
    before, after = metrics.get("before"), metrics.get("after")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return []
    chosen = str(metrics.get("plan") or "")
    original = {k: before.get(k) for k in (*COSTS, "accuracy", "evaluate", "perplexity")}
    likeness = {"mean_kld": 0.0, "top1_agreement": 1.0}
    points = [
        {"plan": "original", "source": "original", "measured": True, **original,
         **{k: v for k, v in likeness.items() if k in after}},
        {"plan": chosen, "source": "this plan", "measured": True, **after},
    ]  # fmt: skip
    for plan in metrics.get("plans") or ():
        if isinstance(plan, dict) and not plan.get("chosen"):
            same = plan.get("macs") == after.get("macs") and plan.get("macs") is not None
            kind = "uniform" if plan.get("plan") == "uniform" else "other budget"
            if not same or kind == "uniform":
                points.append({**plan, "source": kind, "measured": True})
    return points
