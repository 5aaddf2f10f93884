"""The page of a report: one file that fetches nothing, whatever stands in the run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lighten import report
from lighten.report import compare, page
from lighten.report.facts import Facts, of_run
from report_runs import HOSTILE, KINDS, NETWORK_METRICS, changed, layers, look, make_run


@pytest.mark.parametrize("kind", KINDS)
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
