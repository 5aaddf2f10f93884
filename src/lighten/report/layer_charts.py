"""Charts of layers: where the bytes are, and of one layer its weights and its channels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lighten.report.figures import Figure, axis, colour, plain, rounded, scale, word
from lighten.report.units import text, value_of
from lighten.report.words import Phrase

SHOWN_SCORES = 256
"""Bars of importances that a panel draws; of more channels every so-manieth is taken."""

_MOST_TICKS = 64
_MANY = 120
"""Layers from which on the treemap shows blocks first, and layers on a click."""


def short(name: str) -> str:
    """Without what all names have.

    >>> short("model.layers.3.mlp.up_proj.weight"), short("weight")
    ('layers.3.mlp.up_proj', 'weight')
    """
    return re.sub(r"(?<=.)\.weight$", "", re.sub(r"^model\.(?=.*\.)", "", name))


def _block_of(layer: Mapping[str, Any]) -> str:
    """The block that a layer is in, as text; empty for those outside of all."""
    block = layer.get("block")
    if block is not None:
        return str(block)
    found = re.match(r"(?:.*\.)?(?:layers|blocks|h|block|layer|features)\.(\d+)\.", layer["name"])
    return found[1] if found else ""


def treemap(layers: Sequence[Mapping[str, Any]], side: str) -> Figure:
    """Areas are bytes; colours are what is left of them."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        groups.setdefault(_block_of(layer), []).append(layer)
    nested = len(groups) > 1 and len(groups) < len(layers)
    ids, labels, parents, values, hovers = [], [], [], [], []
    colours: list[float | None] = []
    total = sum(value_of(la.get(f"bytes_{side}")) or 0.0 for la in layers)
    # a root of our own, because plotly paints the one that it would add
    ids.append("all")
    labels.append("")
    parents.append("")
    values.append(total)
    colours.append(None)
    hovers.append(_hover_bytes(layers, word("map.layers")))
    names = [""]  # of the layer that a click opens
    for block, members in groups.items():
        inside = "all"
        if nested and block:
            inside = f"block {block}"
            ids.append(inside)
            labels.append(f"{word('map.block')} {plain(block)}")
            parents.append("all")
            values.append(sum(value_of(la.get(f"bytes_{side}")) or 0.0 for la in members))
            colours.append(_left(members))
            names.append("")
            hovers.append(_hover_bytes(members, labels[-1]))
        for layer in members:
            ids.append(f"{inside}/{layer['name']}")
            labels.append(plain(_leaf(str(layer["name"]), block)))
            parents.append(inside)
            values.append(value_of(layer.get(f"bytes_{side}")) or 0.0)
            colours.append(_left([layer]))
            names.append(str(layer["name"]))
            hovers.append(_hover_bytes([layer], plain(short(str(layer["name"])))))
    coloured = any(c is not None and c < 0.995 for c in colours)
    marker: dict[str, Any] = {"line": {"width": 1, "color": colour("paper")}}
    if coloured:
        marker |= {
            "colors": rounded(colours),
            "colorscale": [[0, colour("ramp0")], [0.5, colour("ramp1")], [1, colour("ramp2")]],
            "cmin": 0, "cmax": 1, "showscale": False,
        }  # fmt: skip
    else:
        marker["colors"] = ["rgba(0,0,0,0)", *[colour("ramp1")] * (len(ids) - 1)]
    trace = {
        "type": "treemap", "ids": ids, "labels": labels, "parents": parents,
        "values": rounded(values, 8), "branchvalues": "total", "text": hovers,
        "customdata": names,
        "hovertemplate": "%{text}<extra></extra>", "textinfo": "label", "marker": marker,
        "pathbar": {"visible": nested, "thickness": 24}, "tiling": {"pad": 1},
        "sort": False,
        "level": "all",
    }  # fmt: skip
    if nested:
        trace["maxdepth"] = 2 if len(layers) > _MANY else 3
    layout = {"height": 420, "uniformtext": {"minsize": 10, "mode": "hide"}}
    return {"data": [trace], "layout": layout}


def _leaf(name: str, block: str) -> str:
    shown = short(name)
    if block and (at := f".{shown}.".find(f".{block}.")) >= 0:
        return shown[at + len(block) + 1 :] or shown
    return shown


def _left(layers: Sequence[Mapping[str, Any]]) -> float | None:
    before = sum(value_of(la.get("bytes_before")) or 0.0 for la in layers)
    after = sum(value_of(la.get("bytes_after")) or 0.0 for la in layers)
    return after / before if before and after else None


def _hover_bytes(layers: Sequence[Mapping[str, Any]], title: str) -> str:
    lines = [f"<b>{title}</b>"]
    for side in ("before", "after"):
        found = [value_of(la.get(f"bytes_{side}")) for la in layers]
        if any(v is not None for v in found):
            total = sum(v or 0.0 for v in found)
            lines.append(f"{word(f'side.{side}')}: {text('bytes', total)}")
    formats = dict.fromkeys(str(la["format"]) for la in layers if la.get("format"))
    if formats:
        lines.append(plain(", ".join(formats)))
    return "<br>".join(lines)


def blocks(layers: Sequence[Mapping[str, Any]]) -> tuple[Figure | None, list[dict[str, Any]]]:
    """Bytes of each block, before and after, in order."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        groups.setdefault(_block_of(layer), []).append(layer)
    if len(groups) < 2 or len(groups) > len(layers):
        return None, []
    names = [plain(name) if name else word("map.outside") for name in groups]
    sums = {
        side: [sum(value_of(la.get(f"bytes_{side}")) or 0.0 for la in members)
               for members in groups.values()]
        for side in ("before", "after")
    }  # fmt: skip
    sums = {side: values for side, values in sums.items() if any(values)}
    if not sums:
        return None, []
    by, unit = scale(max(max(values) for values in sums.values()), ("B", "kB", "MB", "GB"))
    traces = [
        {
            "type": "bar", "name": word(f"side.{side}"), "x": names,
            "y": rounded([v / by for v in values]), "marker": {"color": colour(side)},
            "width": 0.78 if side == "before" else 0.46,
            "hovertemplate": f"%{{x}}<br>{word(f'side.{side}')}: %{{y}} {unit}<extra></extra>",
        }
        for side, values in sums.items()
    ]  # fmt: skip
    layout = {
        "barmode": "overlay", "height": 300,
        "xaxis": {"type": "category", **axis(word("map.block"))},
        "yaxis": axis(f"{word('map.bytes')}, {unit}"), "showlegend": True, "hovermode": "x unified",
    }  # fmt: skip
    table = [
        {
            "block": name or Phrase("map.outside"),
            "before": text("bytes", sums["before"][i]) if "before" in sums else "–",
            "after": text("bytes", sums["after"][i]) if "after" in sums else "–",
        }
        for i, name in enumerate(groups)
    ]
    return {"data": traces, "layout": layout}, table


# -- of one layer -------------------------------------------------------------------------------
def histogram(layer: Mapping[str, Any]) -> Figure | None:
    """Weights by value: steps for before, filled after; ticks where the grid of one block lies."""
    found = layer.get("histogram")
    if not isinstance(found, Mapping) or not isinstance(found.get("edges"), list):
        return None
    edges = found["edges"]
    traces: list[dict[str, Any]] = []
    most = 0.0
    for side in ("before", "after"):
        counts = found.get(side)
        if not isinstance(counts, list) or len(counts) + 1 != len(edges):
            continue
        most = max([most, *(value_of(c) or 0.0 for c in counts)])
        fill = {"fill": "tozeroy", "fillcolor": colour(f"{side}_fill")}
        traces.append(
            {
                "type": "scatter", "mode": "lines", "name": word(f"side.{side}"),
                "x": rounded(edges), "y": [*rounded(counts, 6), 0], **fill,
                "line": {"shape": "hv", "width": 1.4, "color": colour(side)},
                "hovertemplate": f"%{{x:.3g}}: %{{y:,}}<extra>{word(f'side.{side}')}</extra>",
            }
        )  # fmt: skip
    if not traces:
        return None
    grid = layer.get("grid")
    if isinstance(grid, list) and grid:
        ticks = rounded(grid[:_MOST_TICKS])
        traces.append(
            {
                "type": "scatter", "mode": "markers", "name": word("layer.grid"), "x": ticks,
                "y": [-0.04 * most] * len(ticks), "hovertemplate": "%{x}<extra></extra>",
                "marker": {"symbol": "line-ns", "size": 9,
                           "line": {"width": 1.4, "color": colour("peer")}},
            }
        )  # fmt: skip
    layout = {
        "height": 250, "xaxis": axis(word("layer.weight")), "yaxis": axis(word("layer.count")),
        "showlegend": True,
    }  # fmt: skip
    return {"data": traces, "layout": layout}


def importance(layer: Mapping[str, Any]) -> Figure | None:
    """Importances of channels, largest first, coloured by whether they stayed."""
    found = layer.get("importance")
    if not isinstance(found, Mapping) or not isinstance(found.get("scores"), list):
        return None
    scores = [value_of(s) or 0.0 for s in found["scores"]]
    kept = found.get("kept")
    kept = [bool(k) for k in kept] if isinstance(kept, list) else []
    if not scores or len(kept) != len(scores):
        kept = [True] * len(scores)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    by = -(-len(order) // SHOWN_SCORES) or 1
    order = order[::by]
    traces = []
    for stays, name, tint in ((True, "layer.stays", "after"), (False, "layer.goes", "gone")):
        chosen = [(place * by + 1, i) for place, i in enumerate(order) if kept[i] is stays]
        if chosen:
            traces.append(
                {
                    "type": "bar", "name": word(name), "x": [place for place, _ in chosen],
                    "y": rounded([scores[i] for _, i in chosen]),
                    "text": [f"{word('layer.channel')} {i}" for _, i in chosen],
                    "textposition": "none", "marker": {"color": colour(tint)},
                    "hovertemplate": "%{text}: %{y:.3g}<extra></extra>",
                }
            )  # fmt: skip
    layout = {
        "height": 230, "bargap": 0.1, "xaxis": axis(word("layer.rank_of_channel")),
        "yaxis": axis(word("layer.importance")), "showlegend": True,
    }  # fmt: skip
    return {"data": traces, "layout": layout} if traces else None
