"""Facts as tables or JSON on stdout. A quantity is a number or {"value", "low", "high"}.

Facts are a dict. Shown in this order: strings and numbers one a line, dicts of quantities as the
columns of one table, lists of dicts as a table each, `notes` last. `before` and `after` come first,
as the page has them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lighten.errors import BadInput
from lighten.progress import duration
from lighten.report.compare import distinct
from lighten.report.terminal import Glance, Records
from lighten.run import Run

_FILE_WIDTH = 200
"""Columns where stdout is no terminal: nothing is folded there."""

_LEARNED = ("accuracy", "evaluate", "perplexity", "top1_agreement", "mean_kld")
"""What a student has more or less of after it has learned."""

_LAST = ("notes", "problems")


def show(facts: Any, as_json: bool = False) -> None:
    """Print facts on stdout."""
    if as_json:
        print(json.dumps(_finite(facts), indent=1, ensure_ascii=False))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    plain = {k: v for k, v in facts.items() if not isinstance(v, (dict, list, tuple))}
    columns = {k: v for k, v in facts.items() if isinstance(v, Mapping) and not _interval(v)}
    alone = {k: v for k, v in facts.items() if _interval(v)}
    if {"before", "after"} <= columns.keys():
        console.print(Glance(facts, str(facts.get("export") or "")))
        if "teacher" in columns:
            steps = (("untaught", columns["before"]), ("taught", columns["after"]))
            rows = [{"step": n, **{k: v[k] for k in _LEARNED if k in v}} for n, v in steps]
            console.print(_rows("student", rows))
        console.print()
        columns = {k: v for k, v in columns.items() if k not in ("teacher", "before", "after")}
    if plain or alone:
        width = max(len(label(k)) for k in plain | alone)
        for key, value in (plain | alone).items():
            line = Text(f"{label(key):{width}}  {quantity(key, value)}")
            console.print(line, soft_wrap=True)
    if columns:
        console.print(_columns(columns))
    for key, value in facts.items():
        if isinstance(value, (list, tuple)) and key not in _LAST and value:
            console.print(_rows(key, value))
    for line in facts.get("notes", ()):
        console.print(Text(f"note: {line}"), soft_wrap=True)


def problems(facts: Any) -> list[str]:
    """What makes these facts a failure: `problems`, a list of sentences."""
    return list(facts.get("problems", ())) if isinstance(facts, Mapping) else []


def of_run(folder: Path) -> dict[str, Any]:
    """What a run measured (metrics.json, once it is there) and which stages are done."""
    run = Run.at(folder, lock=False)
    status = run.status()
    asked = {k: v for k, v in run.request.items() if isinstance(v, (str, int, float))}
    facts: dict[str, Any] = {"run": str(folder), **asked}
    if run.whole("metrics.json"):
        try:
            measured = json.loads(run.path("metrics.json").read_text(encoding="utf-8"))
            facts |= dict(measured)
        except (ValueError, TypeError) as error:
            raise BadInput(f"{run.path('metrics.json')} is damaged: {error}") from error
    else:
        facts["notes"] = ["this run is not finished: the line that began it goes on"]
    stages: dict[str, dict[str, Any]] = {}
    for done in status["done"]:
        stage = done["key"].split("/")[0]
        row = stages.setdefault(stage, {"stage": stage, "files": 0, "bytes": 0, "seconds": 0.0})
        row["files"] += 1
        row["bytes"] += done["bytes"] or 0
        row["seconds"] += done["seconds"] or 0.0
    return facts | {"stages": list(stages.values())}


def of_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """One run's facts; of several, what each measured afterwards, a column each."""
    if len(folders) == 1:
        return of_run(folders[0])
    runs = [of_run(folder) for folder in folders]
    names = distinct([folder.resolve().name for folder in folders])
    facts: dict[str, Any] = {
        name: run.get("after", {}) for name, run in zip(names, runs, strict=True)
    }
    told = [
        f"{name}: {line}" for name, run in zip(names, runs, strict=True)
        for line in run.get("notes", ())
    ]  # fmt: skip
    failed = [
        f"{name}: {line}" for name, run in zip(names, runs, strict=True)
        for line in run.get("problems", ())
    ]  # fmt: skip
    return {**facts, "notes": told, "problems": failed}


def label(key: str) -> str:
    """A key as words."""
    return key.replace("_", " ")


def quantity(key: str, value: Any) -> str:
    """A value in the unit that its key names.

    >>> quantity("bytes", 80_000_000), quantity("top1_agreement", 0.91234)
    ('80.00 MB', '91.2 %')
    >>> quantity("mean_kld", {"value": 0.1434, "low": 0.141, "high": 0.1462})
    '0.1434 (0.141 to 0.1462)'
    """
    if _interval(value):
        low, high = quantity(key, value["low"]), quantity(key, value["high"])
        return f"{quantity(key, value['value'])} ({low} to {high})"
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    if key.endswith("bytes"):
        return f"{value / 1e6:,.2f} MB"
    if key.endswith("_per_second"):
        return f"{value:,.1f}"
    if key.endswith("seconds"):
        return duration(value)
    if key.endswith(("agreement", "accuracy", "share")):
        return f"{100 * value:.1f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _interval(value: Any) -> bool:
    return isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys()


def render(columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """One column a name, one row a quantity; quantities in the order of their first column.

    Two columns, such as `before` and `after`, get a third: the second over the first.
    """
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in columns:
        table.add_column(label(name), justify="right")
    if len(columns) == 2:
        table.add_column("ratio", justify="right")
    for key in keys:
        values = [column.get(key) for column in columns.values()]
        cells = ["" if key not in c else quantity(key, c[key]) for c in columns.values()]
        if len(columns) == 2:
            cells.append(_ratio(*values))
        table.add_row(Text(label(key)), *map(Text, cells))
    return table


def _ratio(first: Any, second: Any) -> str:
    """The second over the first, empty where that is no number.

    >>> _ratio(98_000_000, 80_000_000), _ratio(None, 3), _ratio(0, 3)
    ('0.816x', '', '')
    """
    a, b = (v["value"] if _interval(v) else v for v in (first, second))
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (a, b))
    return f"{b / a:.3g}x" if numbers and a else ""


def _columns(columns: Mapping[str, Mapping[str, Any]]) -> Records:
    """`render`, for any width."""
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    cells = [
        [Text(label(key)), *(Text(quantity(key, c[key]) if key in c else "")
                             for c in columns.values())]
        for key in keys
    ]  # fmt: skip
    return Records(render(columns), ["", *map(label, columns)], cells)


def _rows(title: str, rows: Sequence[Any]) -> Records:
    """A list of dicts as a table; what is nested stays for --json."""
    rows = [row if isinstance(row, Mapping) else {title: row} for row in rows]
    keys = list(dict.fromkeys(k for row in rows for k in row if not _nested(row[k])))
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.title = Text(f"\n{label(title)}", style="bold italic")  # type: ignore[assignment]
    for key in keys:
        numeric = all(isinstance(row.get(key, 0), (int, float)) for row in rows)
        table.add_column(label(key), justify="right" if numeric else "left", overflow="fold")
    cells = [[Text(quantity(k, row[k]) if k in row else "") for k in keys] for row in rows]
    for row in cells:
        table.add_row(*row)
    return Records(table, [label(key) for key in keys], cells)


def _nested(value: Any) -> bool:
    return isinstance(value, Mapping) and not _interval(value)


def _finite(value: Any) -> Any:
    """The same facts with NaN and infinities as null, which JSON can say, and paths as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, Path) else value
