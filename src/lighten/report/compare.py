"""Several runs side by side: one column each, and one picture of all trade-offs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lighten.report import page, tradeoff
from lighten.report.facts import Facts
from lighten.report.glance import EXACT, NOISE, Row, apart, rows
from lighten.report.units import ends_of, value_of
from lighten.report.verdict import verdict
from lighten.report.words import language


def render(runs: Sequence[Facts], lang: str | None = None) -> str:
    """The page as HTML. Raises UnknownName."""
    lang = language(lang)
    names = distinct([run.name for run in runs])
    tables = [{row.key: row for row in rows(run.metrics)} for run in runs]
    keys = [row.key for row in _longest(tables)]
    same = len({str(run.request.get("model")) for run in runs}) == 1
    found = common_curve(runs, names)
    context: dict[str, Any] = {
        "title": " · ".join(names),
        "runs": [
            {"name": name, "facts": run, "verdict": verdict(run.metrics, run.export)}
            for name, run in zip(names, runs, strict=True)
        ],
        "keys": keys,
        "table": [[table.get(key) for table in tables] for key in keys],
        "best": [_best([table.get(key) for table in tables]) if same else None for key in keys],
        "same_model": same,
        "curve": found,
        "rows": _longest(tables),
        "figures": {} if found is None else {f"curve:{k}": f for k, f in found.figures.items()},
    }
    return page.fill("compare.html", context, lang)


def common_curve(runs: Sequence[Facts], names: Sequence[str]) -> tradeoff.Curve | None:
    """The curves of all runs in one; each has its colour."""
    points: list[dict[str, Any]] = []
    owners: list[str] = []
    seen = set[str]()
    for run, name in zip(runs, names, strict=True):
        model = str(run.request.get("model"))
        for point in tradeoff.points_of(run):
            if point.get("source") == "original" and model in seen:
                continue  # one mark for what several runs began with
            points.append(point)
            owners.append(name)
        seen.add(model)
    return tradeoff.curve_of(points, owners)


def distinct(names: Sequence[str]) -> list[str]:
    """Names with a number behind those that come again.

    >>> distinct(["a", "b", "a"])
    ['a', 'b', 'a (2)']
    """
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return out


def _longest(tables: Sequence[dict[str, Row]]) -> list[Row]:
    """A row for each quantity that any run has, in the order of the table."""
    order: dict[str, Row] = {}
    for table in sorted(tables, key=len, reverse=True):
        for key, row in table.items():
            order.setdefault(key, row)
    return list(order.values())


_EXACT = ("bytes", "parameters", "macs", "bits_per_weight")
_LOWER = ("bytes", "parameters", "macs", "bits_per_weight", "p50_ms", "p99_ms", "load_seconds",
          "peak_memory_bytes", "perplexity", "mean_kld", "p99_kld", "relative_error")  # fmt: skip


def _best(cells: Sequence[Row | None]) -> int | None:
    """Which column is best; None where the next is as good as the measurement can tell."""
    known = [(v, i, c) for i, c in enumerate(cells) if c and (v := value_of(c.after)) is not None]
    if len(known) < 2:
        return None
    sign = 1 if known[0][2].key in _LOWER else -1
    first, second, *_ = sorted(known, key=lambda one: sign * one[0])
    a, b = ends_of(first[2].after), ends_of(second[2].after)
    if a is not None and b is not None:
        return first[1] if apart(a, b) else None
    noise = EXACT if first[2].key in _EXACT else NOISE
    return first[1] if abs(first[0] - second[0]) > noise * abs(second[0]) else None
