"""Where the two models differ most: passages of text, or pictures and classes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lighten.report.facts import Facts
from lighten.report.figures import Figure, axis, colour, plain, word
from lighten.report.units import significant, text, value_of

MOST = 12
"""Windows or pictures that a page shows."""

MOST_CLASSES = 40
"""Classes up to which a confusion matrix can be read as a picture."""

_LOUD = 2.0
"""Nats at which a token has the strongest colour."""


def windows(facts: Facts) -> list[dict[str, Any]]:
    """Windows of text, the one that differs most first: tokens with their nats and a shade in
    [0, 1], and the tokens that differ most."""
    found = facts.part("differences")
    rows = [w for w in found.get("windows") or () if isinstance(w, Mapping)]
    rows = [w for w in rows if isinstance(w.get("tokens"), list)]
    rows.sort(key=lambda w: -(value_of(w.get("mean_kld")) or 0.0))
    return [_window(row) for row in rows[:MOST]]


def _window(row: Mapping[str, Any]) -> dict[str, Any]:
    texts = [str(t) for t in row["tokens"]]
    nats = [value_of(k) for k in (row.get("kld") or ())][: len(texts)]
    nats += [None] * (len(texts) - len(nats))
    tokens = [
        {
            "text": shown.replace("\n", "↵\n"),
            "nats": "" if k is None else significant(max(k, 0.0), 2),
            # steps of a twentieth: a page with thousands of tokens stays small
            "shade": 0.0
            if k is None
            else round(min(1.0, math.sqrt(max(k, 0.0) / _LOUD)) * 20) / 20,
        }
        for shown, k in zip(texts, nats, strict=True)
    ]
    worst = sorted((i for i, k in enumerate(nats) if k), key=lambda i: -(nats[i] or 0.0))[:5]
    return {
        "mean": text("mean_kld", row.get("mean_kld")),
        "start": row.get("start"),
        "tokens": tokens,
        "worst": [(texts[i].strip() or texts[i], tokens[i]["nats"]) for i in worst],
    }


def continuation(facts: Facts) -> list[dict[str, str]]:
    """{"prompt", "before", "after"} of what both models were asked; a question first."""
    part = facts.part("differences")
    rows = [part.get(name) for name in ("chat", "continuation")]
    return [
        {key: str(row.get(key) or "") for key in ("prompt", "before", "after")}
        for row in rows
        if isinstance(row, Mapping) and row.get("before")
    ]


def pictures(facts: Facts) -> list[dict[str, Any]]:
    """The pictures that the two disagree on most; only pictures that stand in the file itself."""
    found = facts.part("differences")
    classes = found.get("classes")
    classes = classes if isinstance(classes, list) else []
    rows = [w for w in found.get("worst") or () if isinstance(w, Mapping)]
    out = []
    for row in rows[:MOST]:
        png = str(row.get("png") or "")
        if not re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", png):
            continue
        names = {key: _class(row.get(key), classes) for key in ("label", "before", "after")}
        out.append(
            {
                "png": png, **names, "kld": text("mean_kld", row.get("kld")),
                "before_probability": text("share", row.get("before_probability")),
                "after_probability": text("share", row.get("after_probability")),
            }
        )  # fmt: skip
    return out


def _class(label: Any, classes: Sequence[Any]) -> str:
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(classes):
        return str(classes[label])
    return "" if label is None else str(label)


def confusion(facts: Facts) -> dict[str, Any] | None:
    """{"figures": {"before", "after"}, "classes", "moved"}: right class by row, answer by column.

    moved: the confusions that grew or shrank most, (right, answer, before, after).
    """
    found = facts.part("differences")
    tables = found.get("confusion")
    if not isinstance(tables, Mapping):
        return None
    sides = {s: tables[s] for s in ("before", "after") if _square(tables.get(s))}
    if not sides:
        return None
    count = len(next(iter(sides.values())))
    if any(len(table) != count for table in sides.values()):
        return None
    given = found.get("classes")
    given = given if isinstance(given, list) else []
    classes = [str(given[i]) if i < len(given) else str(i) for i in range(count)]
    figures = {}
    if count <= MOST_CLASSES:
        figures = {side: _heat(table, classes) for side, table in sides.items()}
    moved = []
    if len(sides) == 2:
        a, b = sides["before"], sides["after"]
        cells = [
            (classes[i], classes[j], int(a[i][j]), int(b[i][j]))
            for i in range(count) for j in range(count) if i != j and a[i][j] != b[i][j]
        ]  # fmt: skip
        moved = sorted(cells, key=lambda c: -abs(c[3] - c[2]))[:10]
    right = {
        side: [int(table[i][i]) for i in range(count)] for side, table in sides.items()
    }  # fmt: skip
    return {"figures": figures, "classes": classes, "moved": moved, "right": right,
            "sides": sides if count <= 20 else {}}  # fmt: skip


def _square(table: Any) -> bool:
    return (
        isinstance(table, list)
        and len(table) > 1
        and all(isinstance(row, list) and len(row) == len(table) for row in table)
        and all(value_of(cell) is not None for row in table for cell in row)
    )


def _heat(table: Sequence[Sequence[float]], classes: Sequence[str]) -> Figure:
    """Shares of each right class; the colour is of the square root, so that rare errors show."""
    shares = [[cell / (sum(row) or 1) for cell in row] for row in table]
    names = [plain(name) for name in classes]
    few = len(classes) <= 12
    trace = {
        "type": "heatmap", "x": names, "y": names,
        "z": [[round(math.sqrt(s), 3) for s in row] for row in shares],
        "zmin": 0, "zmax": 1, "showscale": False, "xgap": 1, "ygap": 1,
        "customdata": [[f"{100 * s:.1f} %" for s in row] for row in shares],
        "text": [[f"{cell:,.0f}" if cell else "" for cell in row] for row in table],
        "texttemplate": "%{text}" if few else "",
        "colorscale": [[0, colour("heat0")], [0.5, colour("heat1")], [1, colour("heat2")]],
        "hovertemplate": f"{word('differ.right')}: %{{y}}<br>{word('differ.answer')}: %{{x}}<br>"
        "%{text} (%{customdata})<extra></extra>",
    }  # fmt: skip
    layout = {
        "height": 420,
        "xaxis": {**axis(word("differ.answer")), "type": "category", "tickangle": -45},
        "yaxis": {**axis(word("differ.right")), "type": "category", "autorange": "reversed"},
    }
    return {"data": [trace], "layout": layout}
