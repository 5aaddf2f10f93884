"""The charts of a report: plotly draws them, and they show what was stored."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lighten.report import differences, layer_map, learning, page, tradeoff
from lighten.report.facts import Facts, of_run
from lighten.report.figures import filled
from lighten.report.words import LANGUAGES, say
from report_runs import KINDS, layers, look, make_run


def figures_of(facts: Facts) -> list[Any]:
    found: list[Any] = []
    curve = tradeoff.curve(facts)
    mapped = layer_map.layer_map(facts)
    assert curve is not None
    assert mapped is not None
    assert mapped.blocks is not None
    found += curve.figures.values()
    found += [*mapped.treemap.values(), mapped.blocks]
    found += [chart for panel in mapped.panels for chart in panel["charts"].values()]
    for made in learning.learning(facts):
        found += [made.loss, made.held_out]
    if confusion := differences.confusion(facts):
        found += confusion["figures"].values()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_charts_are_charts_of_plotly(tmp_path: Path, kind: str) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    css = (Path(page.__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    colours = {n.replace("-", "_"): "#123456" for n in re.findall(r"--([\w-]+):", css)}
    found = figures_of(of_run(make_run(tmp_path / "run", kind, history=True)))
    assert len(found) > 20
    for name in LANGUAGES:
        for figure in found:
            done = filled(figure, name, colours)
            graph_objects.Figure(**done)  # raises on any key or value that plotly does not know
            left = json.dumps(done)
            assert "{w:" not in left
            assert '"c:' not in left, "a colour that the theme has not"


def test_the_curve_tells_measured_from_predicted(tmp_path: Path) -> None:
    curve = tradeoff.curve(of_run(make_run(tmp_path / "run")))
    assert curve is not None
    assert (curve.costs, curve.qualities) == (["bytes", "macs"], ["mean_kld", "top1_agreement"])
    traces = curve.figures["bytes|mean_kld"]["data"]
    symbols = {t["marker"]["symbol"] for t in traces}
    assert symbols == {"star", "square", "diamond", "circle-open"}
    (ours,) = (t for t in traces if t["marker"]["symbol"] == "star")
    assert ours["error_y"]["array"] == pytest.approx([0.03])
    assert ours["x"] == [80.0], "in MB"


def test_without_a_stored_curve_metrics_give_what_they_have(tmp_path: Path) -> None:
    curve = tradeoff.curve(of_run(make_run(tmp_path / "run", "network", shown={})))
    assert curve is not None
    assert {r["source"].key for r in curve.rows} == {
        "source.original", "source.this plan", "source.uniform",
    }  # fmt: skip


def test_layers_say_what_was_done_to_them() -> None:
    layer = {
        "width": {"kept": 12, "of": 16}, "sparsity": 0.5, "rank": 8, "format": "int8",
    }  # fmt: skip
    said = [say(p, "en") for p in layer_map.done_to(layer)]
    assert said == ["12 of 16 wide", "50\u00a0% zeros", "rank 8", "int8"]
    assert [say(p, "en") for p in layer_map.done_to({"format": "keep"})] == ["kept"]
    assert layer_map.done_to({"format": "f32", "bytes_before": 4, "bytes_after": 4}) == []


def test_many_importances_are_thinned() -> None:
    (layer,) = layers(1)
    layer["importance"] = {"scores": list(range(5000)), "kept": [1] * 5000}
    (panel,) = layer_map.layer_map(Facts("m", "model", look={"layers": [layer]})).panels  # type: ignore[union-attr]
    assert len(panel["charts"]["importance"]["data"][0]["x"]) <= 256


def test_a_long_history_is_drawn_with_means(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", history=True)
    history = folder / "recover" / "learning" / "history.jsonl"
    lines = [json.dumps({"step": i, "loss": float(i)}) for i in range(1, 5001)]
    history.write_text("\n".join([*lines, '{"step": 5001, "lo']))
    (made,) = learning.learning(of_run(folder))
    assert len(made.loss["data"][0]["x"]) <= 400
    assert made.held_out is None


def test_a_divergence_that_is_held_out_is_shown_as_one(tmp_path: Path) -> None:
    (made,) = learning.learning(of_run(make_run(tmp_path / "run", history=True)))
    assert made.held_out is not None
    assert made.held_out["data"][0]["y"] == [0.05, 0.02], "stored negated, higher being better"
    assert made.held_out["data"][1]["x"] == [20.0], "the best"


def test_only_pictures_that_the_page_holds_itself(tmp_path: Path) -> None:
    shown = look("network")
    shown["differences"]["worst"].append({"png": "https://example.org/a.png", "label": 0})
    shown["differences"]["worst"].append({"png": 'data:image/png;base64,x" onerror="x'})
    facts = of_run(make_run(tmp_path / "run", "network", shown=shown))
    assert len(differences.pictures(facts)) == 1
