"""The report: what is read from a run, how it is judged, and what the page says of it."""

from __future__ import annotations

import json
import os
import re
import string
import subprocess
import sys
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lighten import report
from lighten.cli import main
from lighten.errors import UnknownName, WrongUse
from lighten.report import compare, differences, layer_map, learning, page, tradeoff
from lighten.report.facts import Facts, of_run
from lighten.report.figures import filled
from lighten.report.glance import row, rows
from lighten.report.units import significant, text
from lighten.report.verdict import sentence, verdict
from lighten.report.words import LANGUAGES, Phrase, language, say, words
from report_runs import (
    HOSTILE,
    NETWORK_METRICS,
    TEXT_METRICS,
    layers,
    look,
    make_run,
    rewrite,
    spread,
)

KINDS = ("text", "network")
each_kind = pytest.mark.parametrize("kind", KINDS)


def changed(metrics: dict[str, Any], side: str, **values: Any) -> dict[str, Any]:
    """Metrics with other values on one side."""
    copy = deepcopy(metrics)
    copy[side] |= values
    return copy


# -- facts -----------------------------------------------------------------------------------------
@each_kind
def test_a_finished_run_is_read_whole(tmp_path: Path, kind: str) -> None:
    facts = of_run(make_run(tmp_path / "run", kind, history=True))
    assert (facts.kind, facts.finished, facts.name) == (kind, True, "run")
    assert set(facts.look) == {"layers", "axes", "curve", "differences", "provenance"}
    assert len(facts.histories[0].rows) == 20
    assert facts.stages[0]["stage"] == "candidates"
    assert not facts.notes


def test_an_older_run_has_its_layers_from_the_plan(tmp_path: Path) -> None:
    facts = of_run(make_run(tmp_path / "run", shown={}))
    assert [layer["name"] for layer in facts.rows("layers")] == ["a.2.weight", "a.10.weight"]
    kept, done = facts.rows("layers")
    assert (kept["bytes_before"], kept["bytes_after"]) == (1000.0, 1000.0)
    assert (done["format"], done["bytes_after"], done["sensitivity"]) == ("q4_k", 300.0, 0.01)


def test_a_killed_run_has_what_is_there(tmp_path: Path) -> None:
    facts = of_run(make_run(tmp_path / "run", finished=False, shown={}))
    assert not facts.finished
    assert facts.metrics == {}
    assert facts.rows("layers")


@pytest.mark.parametrize("damage", ["", "{", "null", "[1, 2]", "7"])
@pytest.mark.parametrize("name", ["layers", "axes", "curve", "differences", "provenance"])
def test_what_is_damaged_is_left_out_and_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = make_run(tmp_path / "run")
    rewrite(folder, f"look/{name}.json", damage)
    facts = of_run(folder)
    if damage != "[1, 2]" or name in ("differences", "provenance"):
        assert [note.places["file"] for note in facts.notes] == [f"look/{name}.json"]
    assert "<html" in page.render(facts, "en")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="not a run"):
        of_run(tmp_path)


# -- the top table ---------------------------------------------------------------------------------
def test_rows_say_what_became_better_and_by_how_much() -> None:
    found = {r.key: r for r in rows(NETWORK_METRICS)}
    assert say(found["bytes"].change or "", "en") == "1.81× smaller"
    assert say(found["macs"].change or "", "en") == "2.1× fewer"
    assert (found["p50_ms"].judged, found["p50_ms"].ratio) == ("better", 1.638 / 2.319)
    assert found["examples_per_second"].after == pytest.approx(1000 / 1.638)
    assert found["accuracy"].judged == "same", "its interval has zero in it"
    assert found["accuracy"].text("after") == "93.29\u00a0%"
    assert found["mean_kld"].judged == "", "there is nothing to compare it with"
    assert found["mean_kld"].before is None


@pytest.mark.parametrize(
    ("key", "after", "judged"),
    [
        ("bytes", 3_425_350, "same"),
        ("bytes", 4_000_000, "worse"),
        ("p50_ms", 2.319 * 1.04, "same"),
        ("p50_ms", 2.319 * 1.06, "worse"),
        ("peak_memory_bytes", 90_000_000, "worse"),
        ("accuracy_change", {"value": -0.02, "low": -0.03, "high": -0.01}, "worse"),
        ("accuracy_change", {"value": 0.02, "low": 0.01, "high": 0.03}, "better"),
    ],
)
def test_noise_is_no_change(key: str, after: Any, judged: str) -> None:
    found = row(changed(NETWORK_METRICS, "after", **{key: after}), key.removesuffix("_change"))
    assert found is not None
    assert found.judged == judged


def test_nothing_measured_gives_no_rows() -> None:
    assert rows({}) == []
    assert rows({"before": {"bytes": None}, "after": {"bytes": float("nan")}}) == []
    assert sentence(verdict({})) == ""


# -- the verdict -----------------------------------------------------------------------------------
def test_the_verdict_is_a_sentence() -> None:
    assert sentence(verdict(NETWORK_METRICS, "onnx")) == (
        "1.81× smaller, 2.1× fewer multiply\u2011adds, 1.42× faster in onnxruntime, "
        "accuracy −0.10 points (−0.30 … +0.10). "
        "Beats one setting for all layers by 1.30 points (93.29\u00a0% against 91.99\u00a0%)."
    )
    assert "perplexity +3.6 %" in sentence(verdict(TEXT_METRICS, "gguf"))
    assert "llama.cpp" in sentence(verdict(TEXT_METRICS, "gguf"), "zh")


def test_overlapping_intervals_are_told() -> None:
    metrics = deepcopy(TEXT_METRICS)
    metrics["plans"][1]["mean_kld"] = spread(0.08, 0.02)
    assert "though the intervals overlap" in sentence(verdict(metrics))


def test_where_accuracies_are_equal_what_is_finer_decides() -> None:
    metrics = deepcopy(NETWORK_METRICS)
    first, second = metrics["plans"]
    second |= {"accuracy": first["accuracy"], "mean_kld": spread(0.3, 0.01)}
    first["mean_kld"] = spread(0.2, 0.01)
    assert "mean KL divergence 0.200" in sentence(verdict(metrics))
    del first["mean_kld"]
    assert "As good as one setting for all layers" in sentence(verdict(metrics))


def test_what_did_not_change_is_no_headline() -> None:
    metrics = changed(NETWORK_METRICS, "after", macs=NETWORK_METRICS["before"]["macs"])
    told = [r.key for r in page.tiles(rows(metrics))]
    assert told == ["bytes", "p50_ms", "accuracy", "peak_memory_bytes"]
    assert "macs" in [r.key for r in page.tiles(rows(NETWORK_METRICS))]


def test_what_is_worse_than_plain_stands_first() -> None:
    metrics = deepcopy(TEXT_METRICS)
    metrics["plans"][0]["chosen"], metrics["plans"][1]["chosen"] = "", "yes"
    assert [w.key for w in verdict(metrics).warnings] == ["warning.plain"]
    metrics = deepcopy(TEXT_METRICS)
    metrics["plans"][1]["mean_kld"] = spread(0.05, 0.01)
    assert [w.key for w in verdict(metrics).warnings] == ["warning.worse_than_plain"]
    slow = changed(TEXT_METRICS, "after", generate_tokens_per_second=50.0)
    assert [w.key for w in verdict(slow).warnings] == ["warning.worse"]
    large = changed(TEXT_METRICS, "after", peak_memory_bytes=300e6)
    assert "196\u00a0MB" in say(verdict(large).warnings[0], "en")


@pytest.mark.parametrize(
    ("problem", "key"),
    [
        ("the output is larger than the input (3.00 MB, 2.00 MB)", "problem.larger"),
        ("the output is slower than the input (3 ms, 2 ms)", "problem.slower"),
        ("the budget is not met: bytes 300, allowed 200", "problem.budget"),
        ("something new", "problem.other"),
    ],
)
def test_problems_are_said_in_both_languages(problem: str, key: str) -> None:
    found = verdict({**NETWORK_METRICS, "problems": [problem]}).problems
    assert [p.key for p in found] == [key]
    assert all(value in say(found[0], "zh") for value in found[0].places.values())


# -- words -----------------------------------------------------------------------------------------
def places(template: str) -> set[str]:
    return {name for _, name, *_ in string.Formatter().parse(template) if name is not None}


def test_languages_have_the_same_words_with_the_same_places() -> None:
    first = words("en")
    for name in LANGUAGES:
        assert words(name).keys() == first.keys()
        assert not [k for k in first if places(first[k]) != places(words(name)[k])]
        assert [k for k, v in words(name).items() if not v] in ([], ["list.gap"])


def test_every_word_that_is_used_is_there() -> None:
    folder = Path(report.__file__).parent
    known = set(words("en"))
    used = set()
    for path in [*folder.rglob("*.py"), *folder.rglob("*.html"), *folder.rglob("*.js")]:
        source = path.read_text(encoding="utf-8")
        groups = "|".join(sorted({key.partition(".")[0] for key in known}))
        used |= set(re.findall(rf'"((?:{groups})\.[a-z_0-9]+(?:\.[a-z]+)?)"', source))
    used = {u for u in used if not u.endswith((".html", ".json", ".css", ".js", ".mean_kld"))}
    assert used <= known | {"row.accuracy"}, used - known


def test_a_phrase_never_reads_a_value_as_a_template() -> None:
    assert say(Phrase("problem.other", {"text": "{x} {0}"}), "en") == "{x} {0}"


def test_the_language_is_the_one_asked_for_or_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert language() == "zh"
    assert language("en") == "en"
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert language() == "en"
    with pytest.raises(UnknownName, match="tlh"):
        language("tlh")


def test_numbers_are_short() -> None:
    assert [significant(v) for v in (0.0, 9.999, 0.00012345, 1e-9, -3.14159)] == [
        "0", "10.0", "0.000123", "1.00×10⁻⁹", "−3.14",
    ]  # fmt: skip
    assert text("bytes", 999_999) == "1.00\u00a0MB"
    assert text("bytes", {"value": None}) == "–"
    assert text("bytes", True) == "–"


# -- charts ----------------------------------------------------------------------------------------
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


@each_kind
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


# -- the page --------------------------------------------------------------------------------------
@each_kind
def test_a_page_is_one_file_of_modest_size(tmp_path: Path, kind: str) -> None:
    folder = make_run(tmp_path / "run", kind, history=True)
    path = report.write(folder)
    assert path == folder / "report.html"
    made = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 3_000_000
    assert not re.search(r'(?:src|href)="(?!data:|#)', made), "nothing is fetched"
    assert not [p for p in folder.iterdir() if p.name.startswith(".report")]
    if kind == "text":
        assert "Say hello." in made
        assert "lighten compress model.gguf --budget &#39;80 MB&#39;" in made


def test_a_page_that_would_be_too_large_leaves_charts_of_layers_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = of_run(make_run(tmp_path / "run", shown=look("text", 300)))
    whole = page.render(facts, "en")
    monkeypatch.setattr(page, "MOST_BYTES", len(whole) - 1)
    less = page.render(facts, "en")
    assert len(less) < len(whole) - 100_000
    assert "Charts of single layers and pictures were left out" in less


def test_names_are_text_wherever_they_stand(tmp_path: Path) -> None:
    shown = look("network")
    for layer in shown["layers"]:
        layer["name"] = HOSTILE + layer["name"]
        layer["kind"] = layer["format"] = layer["block"] = HOSTILE
        layer["error_kind"] = HOSTILE
    for axis in shown["axes"]:
        axis["name"] = HOSTILE
        axis["locked"] = HOSTILE
        axis["writers"] = axis["readers"] = [HOSTILE]
    shown["curve"][0]["plan"] = HOSTILE
    shown["differences"]["classes"] = [HOSTILE, "dog"]
    shown["provenance"]["command"] = ["lighten", HOSTILE]
    shown["provenance"]["machine"] = {HOSTILE: HOSTILE}
    metrics = {**NETWORK_METRICS, "notes": [HOSTILE], "problems": [HOSTILE], "data": HOSTILE}
    made = page.render(
        of_run(make_run(tmp_path / "run", "network", metrics=metrics, shown=shown)), "en"
    )
    assert "window.hacked" in made
    assert "<script>window" not in made
    assert "<img src=x" not in made
    assert made.count("<script") == 3 + 0, "data, behaviour, plotly"


def test_a_killed_run_says_so_in_both_languages(tmp_path: Path) -> None:
    facts = of_run(make_run(tmp_path / "run", finished=False, shown={}))
    assert "This run is not finished." in page.render(facts, "en")
    assert "此次运行尚未完成。" in page.render(facts, "zh")


def test_numbers_that_json_cannot_say_stay_out(tmp_path: Path) -> None:
    shown = look("network")
    shown["layers"][0]["sensitivity"] = float("nan")
    shown["layers"][1]["histogram"]["before"][0] = float("inf")
    folder = make_run(tmp_path / "run", "network", shown=shown)
    made = page.render(of_run(folder), "en")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', made)
    json.loads(found, parse_constant=lambda name: pytest.fail(name))


def test_a_model_that_is_only_looked_at_has_a_page() -> None:
    before = [
        {k: v for k, v in layer.items() if not k.endswith("_after")} for layer in layers(12)
    ]  # fmt: skip
    made = page.render(Facts("tiny", "model", look={"layers": before}), "en")
    assert "What this model is made of" in made


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a" / "run", "network")
    better = changed(NETWORK_METRICS, "after", bytes=1_000_000)
    second = make_run(tmp_path / "b" / "run", "network", metrics=better)
    third = make_run(tmp_path / "c", "text", finished=False, shown={})
    path = report.write([first, second, third], lang="en")
    assert path == (tmp_path / "a" / "comparison.html").resolve()
    made = path.read_text(encoding="utf-8")
    assert "run (2)" in made
    assert "This run is not finished." in made
    facts = [of_run(folder) for folder in (first, second)]
    curve = compare.common_curve(facts, ["x", "y"])
    assert curve is not None
    assert {r["run"] for r in curve.rows} == {"x", "y"}


def test_a_broken_page_loses_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run")
    monkeypatch.setattr(page, "render", lambda *_: 1 / 0)
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError"):
        assert report.kept(folder) is None
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_it_works_out_of_a_zip_file(tmp_path: Path) -> None:
    package = Path(report.__file__).parents[1]
    packed = tmp_path / "lighten.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(package.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                archive.write(path, Path("lighten") / path.relative_to(package))
    folder = make_run(tmp_path / "run")
    code = (
        f"import sys; sys.path.insert(0, {str(packed)!r})\n"
        "import lighten.report\n"
        f"assert lighten.__file__.startswith({str(packed)!r})\n"
        f"lighten.report.write({str(folder)!r}, lang='zh')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "文件大小" in (folder / "report.html").read_text(encoding="utf-8")


# -- the command line ------------------------------------------------------------------------------
def test_report_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "mean kld" in out
    assert str(folder / "report.html") in err.replace("\n", "")
    other = tmp_path / "pages" / "x.html"
    assert main(["report", str(folder), "--html", str(other), "--lang", "zh", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"] == "allocated"
    assert '<html lang="zh">' in other.read_text(encoding="utf-8")


def test_report_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("small", "smaller", "smallest")
    folders = [str(make_run(tmp_path / name, "network")) for name in names]
    assert main(["report", *folders]) == 0
    out, _ = capsys.readouterr()
    assert all(name in out for name in names)
    assert (tmp_path / "comparison.html").is_file()


def test_report_opens_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    folder = make_run(tmp_path / "run")
    assert main(["report", str(folder), "--open", "--json"]) == 0
    assert opened == [(folder / "report.html").as_uri()]


def test_report_of_a_failed_run_fails(tmp_path: Path) -> None:
    metrics = {**TEXT_METRICS, "problems": ["the output is larger than the input (2 MB, 1 MB)"]}
    assert main(["report", str(make_run(tmp_path / "run", metrics=metrics))]) == 1


def test_wrong_use_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report", str(make_run(tmp_path / "run")), "--lang", "xx"]) == 2
    assert "known: en, zh" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_that_cannot_be_written_to_is_still_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    folder.chmod(0o500)
    try:
        assert main(["report", str(folder)]) == 0
    finally:
        folder.chmod(0o700)


def test_a_place_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "x.html"
    assert main(["report", str(make_run(tmp_path / "run")), "--html", str(target)]) == 2
