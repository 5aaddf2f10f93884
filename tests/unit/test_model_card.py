"""Model cards: the hub's own reader understands them, and nothing foreign gets out of its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from huggingface_hub import ModelCard

from lighten.containers import gguf
from lighten.containers.gguf import Kind, Typed
from lighten.report import card, cards
from lighten.report.ancestry import Ancestry, ancestry
from lighten.report.card_header import MARK
from lighten.report.facts import of_run
from report_runs import HOSTILE, TEXT_METRICS, make_run, spread

DIGEST = "ab" * 32


def run_of(folder: Path, kind: str, name: str, **made: Any) -> Path:
    """A finished run that has exported one file."""
    make_run(folder, kind, **made)
    (folder / "exports").mkdir()
    (folder / "exports" / name).write_bytes(b"")
    return folder


def read(folder: Path, kind: str, name: str, **made: Any) -> Any:
    [path] = card.write(run_of(folder, kind, name, **made))
    return ModelCard.load(path)


def test_of_a_language_model(tmp_path: Path) -> None:
    found = read(tmp_path / "small", "text", "small.gguf")
    data = found.data
    assert data.library_name == "gguf"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["quantized", "gguf", "lighten"]
    values = {r.metric_type: r.metric_value for r in data.eval_results}
    assert values == {"perplexity": 17.85, "kl_divergence": 0.073, "agreement": 0.828}
    assert {r.dataset_name for r in data.eval_results} == {"built-in text, the part held out"}
    assert data.model_name == "tiny, compressed"
    for said in ("llama-cli -m small.gguf", "2.5× smaller", "| File size | 98.4 MB | 40.0 MB |",
                 "calibrated on a short text", "does not name it"):  # fmt: skip
        assert said in found.text.replace("\u00a0", " "), said


def test_of_a_network(tmp_path: Path) -> None:
    found = read(tmp_path / "half", "network", "half.onnx")
    assert found.data.pipeline_tag == "image-classification"
    assert found.data.library_name == "onnx"
    [accuracy, *_] = found.data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", 0.9329)
    code = found.text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert "np.zeros((1, 3, 32, 32), np.float32)" in code
    assert found.text.index("## Before and after") < found.text.index("## How to run it")


def test_what_got_worse_stands_first(tmp_path: Path) -> None:
    after = {**TEXT_METRICS["after"], "peak_memory_bytes": 400_000_000}
    metrics = {**TEXT_METRICS, "after": after, "problems": ["something is wrong"]}
    text = read(tmp_path / "run", "text", "run.gguf", metrics=metrics).text
    first, second = (line for line in text.splitlines() if line.startswith(">"))
    assert "something is wrong" in first
    assert "memory while running" in second
    assert text.index(first) < text.index(second) < text.index("2.5×")


def test_an_unfinished_run_has_none(tmp_path: Path) -> None:
    assert card.write(run_of(tmp_path / "run", "text", "run.gguf", finished=False)) == []


def test_a_card_that_someone_made_theirs_stays(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", "text", "run.gguf")
    [path] = cards(folder)
    first = path.read_text(encoding="utf-8")
    path.write_text(first + "one more line", encoding="utf-8")
    assert cards(folder) == [path]
    assert path.read_text(encoding="utf-8") == first
    path.write_text(first.replace(MARK + "\n", "") + "mine", encoding="utf-8")
    assert cards(folder) == []
    assert path.read_text(encoding="utf-8").endswith("mine")


def test_no_path_of_the_machine(tmp_path: Path) -> None:
    import lighten.run

    metrics = {**TEXT_METRICS, "data": "/srv/someone/secret/calibration.txt"}
    command = "lighten compress /srv/someone/secret/models/m.gguf --data /srv/someone/d.txt"
    told = {"command": command, "model": {"source": "/srv/someone/m.gguf", "digest": DIGEST},
            "versions": {"lighten": "0.1.0"}}  # fmt: skip
    folder = make_run(tmp_path / "run", "text", metrics=metrics, shown={"provenance": told})
    request = json.loads((folder / lighten.run.REQUEST).read_text())
    (folder / lighten.run.REQUEST).write_text(json.dumps({**request, "source": "/srv/s/m.gguf"}))
    (folder / "exports").mkdir()
    (folder / "exports" / "run.gguf").write_bytes(b"")
    [path] = card.write(folder)
    text = path.read_text(encoding="utf-8")
    assert "/srv" not in text
    assert "lighten compress m.gguf --data d.txt" in text
    assert DIGEST in text
    assert "passages of `calibration.txt`" in text


def test_foreign_words_stay_words(tmp_path: Path) -> None:
    metrics = {**TEXT_METRICS, "notes": [f"a | b\n# c {HOSTILE}"], "data": "x`y``\n---\n<script>"}
    [path] = card.write(run_of(tmp_path / "run", "text", "run.gguf", metrics=metrics))
    found = ModelCard.load(path)
    assert found.data.eval_results
    outside = found.text.replace("\\<", "")
    for line in outside.splitlines():
        if not line.startswith("Quality"):
            assert "<script" not in line
    [quality] = (line for line in found.text.splitlines() if line.startswith("Quality"))
    assert "``` x`y`` --- <script> ```" in quality  # ticks longer than those that it holds
    assert "\n# c" not in found.text


def test_a_student(tmp_path: Path) -> None:
    from lighten.run import Run

    asked = {"teacher": DIGEST, "student": "half depth", "source": "nets.py:deep", "export": None,
             "inputs": [[2, 3, 16, 16]]}  # fmt: skip
    side = {"parameters": 100, "accuracy": spread(0.9, 0.01)}
    metrics = {"teacher": side, "before": {**side, "parameters": 50},
               "after": {**side, "parameters": 50}, "examples": 40, "data": "a tuple",
               "learning": [{"length": "10epochs", "learn_from": "logits:1"}]}  # fmt: skip
    with Run.open(tmp_path / "run", asked) as run:
        run.file("model", lambda path: path.mkdir())
        run.json("metrics", lambda: metrics)
    [path] = card.write(tmp_path / "run")
    assert path == tmp_path / "run" / "README.md"
    found = ModelCard.load(path)
    assert "distillation" in found.data.tags
    for said in ("| Teacher | Student |", "lighten.load(deep, 'model')", "10 epochs",
                 "`data in memory`", "the same network, half depth"):  # fmt: skip
        assert said in found.text, said


# -- what the original says ----------------------------------------------------------------------
def test_a_folder_says_its_licence(tmp_path: Path) -> None:
    header = "---\nlicense: other\nlicense_name: my-own\nlanguage: [en, zh]\ntags: [chat]\n---\n# x"
    (tmp_path / "README.md").write_text(header)
    found = ancestry(str(tmp_path))
    assert found == Ancestry("other", "my-own", "", "", ("en", "zh"), ("chat",))
    (tmp_path / "README.md").write_text("---\nlicense: [apache-2.0]\nlanguage: {a: b}\n---\n")
    assert ancestry(str(tmp_path)) == Ancestry("apache-2.0")
    for damaged in ("---\n: : [\n---\n", "no header", "---\n- a\n---\n", "---\nlicense: 'a\\nb'"):
        (tmp_path / "README.md").write_text(damaged)
        assert ancestry(str(tmp_path)) == Ancestry()


def test_a_gguf_says_its_licence_and_where_it_is_from(tmp_path: Path) -> None:
    fields = {
        "general.architecture": "llama", "general.license": "mit",
        "general.languages": Typed(["en"], Kind.STRING),
        "general.source.repo_url": "https://huggingface.co/some-one/Model-1B",
    }  # fmt: skip
    gguf.write(tmp_path / "m.gguf", fields, [], lambda name: b"")
    found = ancestry(str(tmp_path / "m.gguf"))
    assert found == Ancestry("mit", base="some-one/Model-1B", languages=("en",))
    text = card.card(of_run(make_run(tmp_path / "run")), found, ["run.gguf"])
    for line in ("license: mit", "base_model: some-one/Model-1B",
                 "base_model_relation: quantized", "- en"):  # fmt: skip
        assert f"\n{line}\n" in text
    (tmp_path / "m.gguf").write_bytes(b"no model")
    assert ancestry(str(tmp_path / "m.gguf")) == Ancestry()


@pytest.mark.parametrize("source", ["", "nowhere", "a/b/c", "file.py:factory", "/no/where"])
def test_what_says_nothing(source: str) -> None:
    assert ancestry(source) == Ancestry()


def test_a_hub_id_is_what_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert ancestry("no-one-such/Model-1B-that-is-not-there").base.startswith("no-one-such/")
