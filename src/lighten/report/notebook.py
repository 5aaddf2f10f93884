"""A result in a notebook: the verdict, the top table and the trade-off curve as plain HTML.

Styles stand in the elements and colours follow the notebook's own, light or dark; no script, so
that it is also seen where a notebook is only shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lighten.report.facts import Facts, of_run
from lighten.report.glance import Row, rows
from lighten.report.svg_curve import curve
from lighten.report.units import shown
from lighten.report.verdict import sentence, verdict
from lighten.report.words import language, say

_CELL = "padding:.15em .8em .15em 0;border:0;vertical-align:top"
_RIGHT = f"{_CELL};text-align:right;white-space:nowrap"
_LEFT = f"{_CELL};text-align:left"
_TABLE = '<table style="border-collapse:collapse;color:inherit;font-size:inherit">'
_SOFT = "opacity:.72"
_JUDGED = {"worse": "font-weight:600"}
_QUIET = ("change.same", "change.equal")


def of_result(folder: Path, metrics: Mapping[str, Any], lang: str | None = None) -> str:
    """Of a run: what its folder keeps, or metrics alone where that is gone."""
    from lighten.errors import UserError

    try:
        facts = of_run(folder)
    except UserError:
        facts = Facts(folder.name, "network")
    if not facts.metrics:
        facts = Facts(facts.name, facts.kind, metrics=metrics, request=facts.request)
    return of_facts(facts, lang)


def of_facts(facts: Facts, lang: str | None = None) -> str:
    """The verdict, the table and the curve. lang: see words.language."""
    lang = language(lang)
    found = verdict(facts.metrics, facts.export)
    parts = []
    for name, phrases in (("verdict.problem", found.problems), ("verdict.warning", found.warnings)):
        for phrase in phrases:
            line = f"<b>{_say(name, lang)}</b> {_say(phrase, lang)}"
            parts.append(f'<p style="margin:.2em 0">{line}</p>')
    if told := sentence(found, lang):
        parts.append(f'<p style="margin:.2em 0 .6em;font-weight:600">{escape(told)}</p>')
    if table := rows(facts.metrics):
        parts.append(_glance(table, facts, lang))
    if drawn := curve(facts, lang):
        parts.append(drawn)
    return f'<div style="max-width:60em">{"".join(parts)}</div>'


def of_rows(title: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """A small table of plain values, such as the widths of axes."""
    keys = list(dict.fromkeys(key for line in lines for key in line))
    head = "".join(f'<th scope="col" style="{_LEFT}">{escape(k.replace("_", " "))}</th>'
                   for k in keys)  # fmt: skip
    body = ""
    for line in lines:
        cells = (escape(shown(key, line.get(key))) for key in keys)
        body += "<tr>" + "".join(f'<td style="{_LEFT}">{c}</td>' for c in cells) + "</tr>"
    return (
        f'<p style="margin:.2em 0;font-weight:600">{escape(title)}</p>'
        f"{_TABLE}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _glance(table: Sequence[Row], facts: Facts, lang: str) -> str:
    taught = facts.kind == "distill"
    sides = ("side.teacher", "side.student") if taught else ("side.before", "side.after")
    heads = "".join(f'<th scope="col" style="{_RIGHT}">{_say(side, lang)}</th>' for side in sides)
    first = f'<th scope="col" style="{_LEFT}">{_say("glance.quantity", lang)}</th>'
    last = f'<th scope="col" style="{_LEFT}">{_say("glance.change", lang)}</th>'
    body = "".join(
        f'<tr><th scope="row" title="{_say(f"term.{row.key}", lang)}"'
        f' style="{_LEFT};font-weight:400">{_say(f"row.{row.key}", lang)}</th>'
        f'<td style="{_RIGHT}">{_value(row, "before", lang)}</td>'
        f'<td style="{_RIGHT}">{_value(row, "after", lang)}</td>'
        f'<td style="{_LEFT}">{_change(row, lang)}</td></tr>'
        for row in table
    )
    return f"{_TABLE}<thead><tr>{first}{heads}{last}</tr></thead><tbody>{body}</tbody></table>"


def _value(row: Row, side: str, lang: str) -> str:
    found = escape(row.text(side))
    if row.unit and row.text(side) != "–":
        found += f" {_say(row.unit, lang)}"
    if interval := row.interval(side):
        found += f' <span style="{_SOFT}">({escape(interval)})</span>'
    return found


def _change(row: Row, lang: str) -> str:
    if row.change is None:
        return ""
    found = f'<span style="{_JUDGED.get(row.judged, "")}">{_say(row.change, lang)}</span>'
    if row.judged == "worse":
        return f"{found} ({_say('judged.worse', lang)})"
    if row.judged == "same" and row.change.key not in _QUIET:
        return f'{found} <span style="{_SOFT}">({_say("judged.same", lang)})</span>'
    return found


def _say(phrase: Any, lang: str) -> str:
    return escape(say(phrase, lang))
