"""The top table in a terminal: the rows of the page, laid out for the width that there is.

Wide: a column for each side, intervals beside the values. Narrower: intervals below the values.
Narrow: a quantity a line, its values below it. What a colour says, a word says too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lighten.report.glance import Row, rows
from lighten.report.units import NBSP, shown
from lighten.report.verdict import sentence, verdict
from lighten.report.words import say

SIDES = ("before", "after")
TAUGHT = ("teacher", "student")
_STYLES = {"better": "green", "worse": "red", "same": "", "": ""}
_QUIET = ("change.same", "change.equal")
"""Changes that say themselves that nothing can be told apart."""


_HYPHEN = "\u2011"

_LAYOUTS: Sequence[tuple[bool, tuple[int, int] | None, int]] = (
    (True, None, 2),
    (False, None, 2),
    (False, (29, 18), 2),
    (False, (16, 14), 1),
)
"""From wide to narrow; see Glance._table."""


class Glance:
    """Before and after, side by side. metrics: of metrics.json; a distillation's are of teacher and
    student. export: what was written. verdict: whether the sentence stands above the table."""

    def __init__(
        self, metrics: Mapping[str, Any], export: str = "", *, verdict: bool = True
    ) -> None:
        taught = isinstance(metrics.get("teacher"), Mapping)
        self.metrics = {**metrics, "before": metrics["teacher"]} if taught else metrics
        self.sides = TAUGHT if taught else SIDES
        self.export = export or _written(metrics.get("after"))
        self.verdict = verdict

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.verdict:
            yield from self._said()
        found = rows(self.metrics)
        if found:
            tables = [self._table(found, *layout) for layout in _LAYOUTS]
            yield fitting(console, options, tables, self._lines(found))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(20, options.max_width)

    def _said(self) -> Iterator[RenderableType]:
        """What got worse than a plain baseline, then the gains in a sentence."""
        found = verdict(self.metrics, self.export)
        for warning in found.warnings:
            first = f"{say('verdict.warning', 'en')} "
            yield Text.assemble((first, "bold yellow"), plain(say(warning, "en")))
        if told := sentence(found):
            yield Text(plain(told), style="bold")
            yield Text("")

    def _table(
        self, found: Sequence[Row], beside: bool, most: tuple[int, int] | None, gap: int
    ) -> Table:
        """beside: whether intervals stand beside values. most: width of the first and the last
        column, None where neither is folded. gap: between columns."""
        label, change = most or (None, None)
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, gap, 0, 0))
        table.add_column("", no_wrap=most is None, max_width=label)
        for side in self.sides:
            table.add_column(side, justify="right", no_wrap=True)
        table.add_column("change", no_wrap=most is None, max_width=change)
        for row in found:
            values = [_value(row, side, " " if beside else "\n") for side in SIDES]
            style = "dim" if row.minor else ""
            table.add_row(Text(_label(row), style=style), *values, _change(row))
        return table

    def _lines(self, found: Sequence[Row]) -> Group:
        """A quantity a line, below it the two values and the change."""
        parts: list[RenderableType] = []
        for row in found:
            values = Table.grid(padding=(0, 2, 0, 0))
            values.add_column(no_wrap=True, style="dim")
            values.add_column(overflow="fold")
            for name, side in zip(self.sides, SIDES, strict=True):
                if row.text(side) != "–":
                    values.add_row(f"  {name}", _value(row, side, " "))
            if (change := _change(row)).plain:
                values.add_row("  change", change)
            parts += [Text(_label(row), style="bold"), values]
        return Group(*parts)


def fitting(
    console: Console, options: ConsoleOptions, tables: Sequence[Table], narrow: RenderableType
) -> RenderableType:
    """The first table that has room without folding a cell, else what is narrow."""
    unbounded = options.update(width=10_000)
    for table in tables:
        if Measurement.get(console, unbounded, table).maximum <= options.max_width:
            return table
    return narrow


class Records:
    """A table where it has room; where it has none, a block of lines for each of its rows."""

    def __init__(self, table: Table, keys: Sequence[str], cells: Sequence[Sequence[Text]]) -> None:
        self.table, self.keys, self.cells = table, keys, cells

    @classmethod
    def of(cls, title: str, rows: Sequence[Mapping[str, Any]]) -> Records:
        """Of rows of plain values; a number in the unit that its key names."""
        keys = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[Text(plain(shown(key, row.get(key)))) for key in keys] for row in rows]
        table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
        table.title = title
        for key in keys:
            numeric = all(isinstance(row.get(key, 0), (int, float)) for row in rows)
            table.add_column(key.replace("_", " "), justify="right" if numeric else "left")
        for row in cells:
            table.add_row(*row)
        return cls(table, [key.replace("_", " ") for key in keys], cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield fitting(console, options, (self.table,), self._lines())

    def _lines(self) -> Table:
        lines = Table.grid(padding=(0, 2, 0, 0))
        lines.title, lines.title_justify = self.table.title, "left"
        lines.add_column(no_wrap=True, style="dim")
        lines.add_column(overflow="fold")
        for cells in self.cells:
            for number, (key, cell) in enumerate(zip(self.keys, cells, strict=True)):
                if cell.plain:
                    lines.add_row(key if number == 0 else f"  {key}", cell)
        return lines


def _written(after: Any) -> str:
    """Which exporter's file was timed, as far as what was timed says so."""
    keys = after.keys() if isinstance(after, Mapping) else ()
    return "gguf" if "generate_tokens_per_second" in keys else "onnx" if "p50_ms" in keys else ""


def plain(text: str) -> str:
    """Without the blanks and hyphens that do not break: a terminal may break anywhere."""
    return text.replace(NBSP, " ").replace(_HYPHEN, "-")


def _label(row: Row) -> str:
    return plain(say(f"row.{row.key}", "en"))


def _value(row: Row, side: str, gap: str) -> Text:
    """The value, its unit, and the interval behind or below it."""
    shown = row.text(side)
    if row.unit and shown != "–":
        shown += f" {say(row.unit, 'en')}"
    found = Text(plain(shown), style="dim" if row.minor else "")
    if interval := row.interval(side):
        found.append(f"{gap}({plain(interval)})", style="dim")
    return found


def _change(row: Row) -> Text:
    """The change, and in words where that is for the worse or may be nothing."""
    if row.change is None:
        return Text("")
    found = Text(plain(say(row.change, "en")), style=_STYLES[row.judged])
    if row.judged == "worse":
        found.append(f", {say('judged.worse', 'en')}", style="red")
    elif row.judged == "same" and row.change.key not in _QUIET:
        found.append(f", {say('judged.same', 'en')}", style="dim")
    return found
