"""The trade-off curve as one SVG that stands in a page: quality against what is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lighten.report.facts import Facts
from lighten.report.figures import known, scale
from lighten.report.tradeoff import SHARES, UNITS, drawable, points_of, source_of
from lighten.report.units import ends_of, text, value_of
from lighten.report.words import say

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 44
_COLOURS = {
    "this plan": "#2f7dd1", "other budget": "#2f7dd1", "uniform": "#9463d6",
    "peer": "#c4761b", "original": "#808a96",
}  # fmt: skip
"""Each at least 3:1 against white and against a dark notebook; shapes tell the same."""

_TAUGHT = {"this plan": "side.student", "original": "side.teacher"}


@dataclass(frozen=True)
class _Frame:
    """From values to places in the picture."""

    low: tuple[float, float]
    high: tuple[float, float]

    def x(self, value: float) -> float:
        share = (value - self.low[0]) / (self.high[0] - self.low[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low[1]) / (self.high[1] - self.low[1])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def curve(facts: Facts, lang: str = "en") -> str:
    """An <svg>, empty where fewer than two points can be set beside each other."""
    points = points_of(facts)
    names = _TAUGHT if facts.kind == "distill" else {}
    pairs = drawable(points)
    if not pairs:
        return ""
    (cost, quality), here = next(iter(pairs.items()))  # the one that says most
    return _drawn([points[i] for i in here], cost, quality, lang, names)


def _drawn(
    points: Sequence[Mapping[str, Any]],
    cost: str,
    quality: str,
    lang: str,
    names: Mapping[str, str],
) -> str:
    """names: what kinds of points are called where that is not `source.<kind>`."""
    percent = 100.0 if quality in SHARES else 1.0
    largest = max(abs(value_of(p[cost]) or 0.0) for p in points)
    by, unit = scale(largest, UNITS[cost])
    places = [
        ((value_of(p[cost]) or 0.0) / by, percent * (value_of(p[quality]) or 0.0)) for p in points
    ]
    spans = [
        tuple(percent * e for e in ends_of(p[quality]) or ()) or (v, v)
        for p, (_, v) in zip(points, places, strict=True)
    ]
    xs, ys = [x for x, _ in places], [y for span in spans for y in span]
    across, up = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    frame = _Frame((across[0], up[0]), (across[-1], up[-1]))
    x_name = f"{say(f'row.{cost}', lang)}{f', {unit}' if unit else ''}"
    end = ", %" if percent == 100 else ", nats" if quality.endswith("kld") else ""
    y_name = f"{say(f'row.{quality}', lang)}{end}"
    title = f"{say('curve.title', lang)}: {y_name}; {x_name}"
    parts = [_axes(frame, across, up, x_name, y_name)]
    marks = zip(points, places, spans, strict=True)
    # the result last, above all else
    ordered = sorted(marks, key=lambda m: str(m[0].get("source")) == "this plan")
    for point, (x, y), (low, high) in ordered:
        hover = ", ".join(
            (say(known("plan", str(point.get("plan", ""))), lang), say(_how(point), lang),
             text(cost, point[cost]), text(quality, point[quality]))
        )  # fmt: skip
        parts.append(_mark(frame, point, x, y, low, high, hover))
    parts.append(_legend(points, lang, names))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"'
        f' style="display:block;margin-top:.8em;width:100%;max-width:{WIDTH}px;height:auto"'
        f' font-family="inherit" font-size="12" fill="currentColor">{"".join(parts)}</svg>'
    )


def _axes(
    frame: _Frame, across: Sequence[float], up: Sequence[float], x_name: str, y_name: str
) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value in up:
        y = frame.y(value)
        parts.append(
            f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor"'
            f' stroke-opacity=".15"/><text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f"{_number(value, up)}</text>"
        )
    for value in across:
        x = frame.x(value)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"'
            f' stroke="currentColor"/><text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">'
            f"{_number(value, across)}</text>"
        )
    parts.append(
        f'<line x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="currentColor"/>'
        f'<text x="{right}" y="{HEIGHT - 8}" text-anchor="end">{escape(x_name)}</text>'
        f'<text x="8" y="14">{escape(y_name)}</text>'
    )
    return "".join(parts)


def _mark(
    frame: _Frame, point: Mapping[str, Any], x: float, y: float, low: float, high: float,
    hover: str,
) -> str:  # fmt: skip
    source = source_of(point)
    colour = _COLOURS[source]
    measured = bool(point.get("measured", True))
    parts = [f"<title>{escape(hover)}</title>"]
    if high > low:
        parts.append(
            f'<line x1="{frame.x(x):.1f}" x2="{frame.x(x):.1f}" y1="{frame.y(low):.1f}"'
            f' y2="{frame.y(high):.1f}" stroke="{colour}" stroke-opacity=".6"/>'
        )
    fill = f'fill="{colour}"' if measured else 'fill="none"'
    style = f'{fill} stroke="{colour}" stroke-width="1.5"'
    parts.append(_shape(source, frame.x(x), frame.y(y), style))
    return f"<g>{''.join(parts)}</g>"


def _shape(source: str, x: float, y: float, style: str) -> str:
    if source == "other budget":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {style}/>'
    if source == "uniform":
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" {style}/>'
    turns, size, inner = {"this plan": (5, 8.5, 3.6), "peer": (3, 6.0, 3.0)}.get(
        source, (4, 6.0, 0.0)
    )
    corners = []
    for i in range(2 * turns if inner and turns == 5 else turns):
        count = 2 * turns if inner and turns == 5 else turns
        radius = inner if turns == 5 and i % 2 else size
        angle = 2 * math.pi * i / count - math.pi / 2
        corners.append(f"{x + radius * math.cos(angle):.1f},{y + radius * math.sin(angle):.1f}")
    return f'<polygon points="{" ".join(corners)}" {style}/>'


def _legend(points: Sequence[Mapping[str, Any]], lang: str, names: Mapping[str, str]) -> str:
    """The kinds of points in a row above the picture, from the right."""
    kinds = list(dict.fromkeys((source_of(p), bool(p.get("measured", True))) for p in points))
    order = list(_COLOURS)
    kinds.sort(key=lambda kind: order.index(kind[0]), reverse=True)
    parts, x = [], float(WIDTH - RIGHT)
    for source, measured in kinds:
        label = say(names.get(source, f"source.{source}"), lang)
        if not measured:
            label += f", {say('curve.predicted', lang)}"
        parts.append(f'<text x="{x:.0f}" y="30" text-anchor="end">{escape(label)}</text>')
        x -= sum(11.5 if ord(c) > 0x2E80 else 6.2 for c in label) + 10
        fill = f'fill="{_COLOURS[source]}"' if measured else 'fill="none"'
        parts.append(_shape(source, x, 26, f'{fill} stroke="{_COLOURS[source]}"'))
        x -= 18
    return "".join(parts)


def _how(point: Mapping[str, Any]) -> str:
    return "curve.measured" if point.get("measured", True) else "curve.predicted"


def _number(value: float, ticks: Sequence[float]) -> str:
    """A tick with the decimals that tell it from the next.

    >>> _number(0.05, [0, 0.05]), _number(75, [75, 80]), _number(2.5, [0, 2.5])
    ('0.05', '75', '2.5')
    """
    step = ticks[1] - ticks[0]
    decimals = next((d for d in range(12) if abs(step - round(step, d)) < 1e-6 * step), 12)
    return f"{value:,.{decimals}f}".replace("-", "−")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that hold both ends.

    >>> _ticks(0.0, 0.34), _ticks(91.2, 93.4)
    ([0.0, 0.1, 0.2, 0.3, 0.4], [91.0, 92.0, 93.0, 94.0])
    """
    if not high > low:
        low, high = low - (abs(low) or 1.0) / 10, high + (abs(high) or 1.0) / 10
    rough = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(s * size for s in (1, 2, 2.5, 5, 10) if s * size >= 0.99 * rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]
