"""Distillation of language models: made students, other students, trials, files, mistakes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning", reason="learning needs lightning")

import lighten
from lighten import progress, taught_language_model
from lighten.cli import main
from lighten.errors import BadInput, BadOutput, ChangedRequest, WrongUse
from lighten.model import open_model
from lighten.runtimes import llama_cpp

Tiny = Callable[..., Path]
QUICK: dict[str, Any] = {"length": "12steps", "window": 32, "batch": 4, "samples": 8, "rate": 1e-3,
                         "accelerator": "cpu", "precision": "32-true"}  # fmt: skip
LAYERS = {
    "llama": {"num_hidden_layers": 4}, "gpt2": {"n_layer": 4},
    "gemma3_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention",
                                                            "full_attention", "full_attention"]},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[None]:
    """llama.cpp opens every export, but is not timed."""
    monkeypatch.setattr(llama_cpp, "speed", lambda path, **_: llama_cpp.Speed(1.0, 2.0, 3.0, 4))
    yield
    progress.be_quiet(False)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"Line {i}: the quick fox sees {i * i} birds." for i in range(200)))
    return path


def deep(tiny: Tiny, family: str = "llama", **more: Any) -> Path:
    return tiny(family, **{**LAYERS[family], **more})


@pytest.mark.parametrize(
    ("family", "student"),
    [
        ("llama", "half depth"), ("llama", "3 layers, half width"),
        ("gpt2", "half depth, half width"), ("gemma3_text", "half depth"),
        ("gpt2", "2 layers, half width, from scratch"),
        ("gemma3_text", "half depth, from scratch"),
    ],
)  # fmt: skip
def test_a_student_made_from_its_teacher_learns_and_transformers_loads_it(
    tiny: Tiny, text: Path, tmp_path: Path, family: str, student: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "run"
    found = lighten.distill(deep(tiny, family), student, text, out=out, **QUICK)
    m = found.metrics
    assert m["after"]["mean_kld"]["value"] < m["before"]["mean_kld"]["value"]
    assert m["after"]["mean_kld"]["low"] <= m["after"]["mean_kld"]["value"]
    assert m["after"]["parameters"] < m["teacher"]["parameters"]
    assert m["learning"][0]["after"] < m["learning"][0]["before"]
    assert not m["problems"]
    ids = torch.arange(20)[None]
    module = AutoModelForCausalLM.from_pretrained(out / "model")
    assert torch.allclose(module(ids).logits, found.module(ids).logits, atol=1e-5)
    assert module.config.num_hidden_layers == (3 if student.startswith("3") else 2)
    assert AutoTokenizer.from_pretrained(out / "model")("a fox").input_ids
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForCausalLM.from_pretrained('model')" in card
    assert "| Teacher | Student |" in card
    assert (out / "report.html").stat().st_size > 10_000


def test_it_is_stored_once_and_another_request_is_refused(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**QUICK, "export": "gguf", "out": tmp_path / "run"}
    found = lighten.distill(deep(tiny), "half depth", text, **asked)
    made = open_model(found.exported)
    assert len(made.blocks) == 2
    assert found.metrics["after"]["generate_tokens_per_second"] == 3.0
    monkeypatch.setattr(taught_language_model, "learn", None)
    again = lighten.distill(deep(tiny), "half depth", text, **asked)
    assert again.metrics == found.metrics
    with pytest.raises(ChangedRequest, match="length"):
        lighten.distill(deep(tiny), "half depth", text, **{**asked, "length": "6steps"})


def test_another_model_learns_as_well_a_gguf_too(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    student = tiny("qwen3", num_hidden_layers=1, hidden_size=32, seed=1)
    found = lighten.distill(deep(tiny), student, text, out=tmp_path / "a",
                            **{**QUICK, "learn_from": "logits:1,hidden:0.5"})  # fmt: skip
    m = found.metrics
    assert m["after"]["mean_kld"]["value"] < m["before"]["mean_kld"]["value"]
    source = tmp_path / "teacher.gguf"
    lighten.exporters["gguf"].write(open_model(deep(tiny)), {}, source)
    found = lighten.distill(source, "half depth", text, out=tmp_path / "b", **QUICK)
    assert found.student.kind == "huggingface"
    assert (
        found.metrics["after"]["mean_kld"]["value"] < found.metrics["before"]["mean_kld"]["value"]
    )


def test_a_student_that_gets_no_better_is_as_it_was_given(
    tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    teacher = deep(tiny)
    found = lighten.distill(teacher, teacher, text, out=tmp_path / "run",
                            **{**QUICK, "learn_from": "labels"})  # fmt: skip
    assert found.metrics["learning"][0]["best_step"] == 0
    assert found.metrics["after"]["mean_kld"]["value"] == 0
    for name, tensor in open_model(teacher).tensors.items():
        assert tensor.load().equal(found.student.tensors[name].load()), name


def test_the_teachers_answers_are_stored_where_windows_come_again(
    tiny: Tiny, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    undocumented: Callable[[Path], set[str]],
) -> None:  # fmt: skip
    short = tmp_path / "short.txt"
    short.write_text(text.read_text()[:4000])
    asked = {**QUICK, "learn_from": "topk:1:k=16,labels:0.1", "length": "30steps"}
    found = lighten.distill(deep(tiny), "half depth", short, out=tmp_path / "run", **asked)
    assert (
        found.metrics["after"]["mean_kld"]["value"] < found.metrics["before"]["mean_kld"]["value"]
    )
    assert list((tmp_path / "run" / "teacher").glob("*.safetensors"))
    assert not undocumented(tmp_path / "run")
    assert "the teacher's answers go to disk" in capsys.readouterr().err


def test_trials_choose_the_lesson(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    found = lighten.distill(deep(tiny), "half depth", text, tune=3, out=tmp_path / "run",
                            **{**QUICK, "learn_from": "logits:1,labels:0.5"})  # fmt: skip
    rows = found.metrics["trials"]
    assert [row["lesson"] for row in rows if row["chosen"]] == [found.metrics["learn_from"]]
    assert len(rows) == 3
    assert all(row["value"] > 0 for row in rows)


def test_other_text_is_measured_on(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    test = tmp_path / "test.txt"
    test.write_text("Nine pears, 42 plums and a basket of figs. Where does the river go?\n" * 20)
    found = lighten.distill(deep(tiny), "half depth", text, test=test, out=tmp_path / "run",
                            **QUICK)  # fmt: skip
    assert found.metrics["data"] == str(test)


@pytest.mark.parametrize(
    ("student", "options", "error", "said"),
    [
        ("most depth", {}, WrongUse, "`most` is no share"),
        ("9 layers", {}, WrongUse, "its teacher has 4"),
        ("half depth, 3 layers", {}, WrongUse, "twice"),
        ("nothing", {}, WrongUse, "there is no model nothing"),
        (torch.nn.Linear(2, 2), {}, WrongUse, "the student a Linear"),
        ("half depth", {"learn_from": "attention"}, WrongUse, "attention"),
        ("half depth", {"length": "long"}, WrongUse, "cannot be read"),
        ("half depth", {"window": 256}, WrongUse, "takes no more than 128"),
        ("half depth", {"rate": 1e30}, BadOutput, "step"),
        ("half depth", {"rate": 0.0}, WrongUse, "rate"),
        ("half depth", {"optimizer": "sdg"}, WrongUse, "optimizer `sdg` is not known"),
        ("half depth", {"export": "onnx"}, WrongUse, "cannot hold"),
        ("half depth", {"augment": "flip"}, WrongUse, "augment is for networks"),
        ("half depth", {"tune": 2, "learn_from": "labels"}, WrongUse, "nothing to tune"),
    ],
)
def test_a_mistake_is_told(
    tiny: Tiny, text: Path, tmp_path: Path, student: Any, options: dict[str, Any], error: Any,
    said: str,
) -> None:  # fmt: skip
    if "tune" in options:
        pytest.importorskip("optuna")
    with pytest.raises(error) as caught:
        lighten.distill(deep(tiny), student, text, out=tmp_path / "run", **{**QUICK, **options})
    assert said in str(caught.value)
    assert caught.value.hint


def test_a_window_too_long_names_its_own_option(tiny: Tiny, text: Path) -> None:
    with pytest.raises(WrongUse) as caught:
        lighten.distill(deep(tiny), "half depth", text, **{**QUICK, "window": 256})
    assert caught.value.hint == "give --window 128 or less"


def test_models_and_texts_that_do_not_go_together_are_told(
    tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    teacher = deep(tiny)
    with pytest.raises(WrongUse, match="they cannot match"):
        lighten.distill(teacher, tiny("llama", vocab_size=512), text, **QUICK)
    size = len(open_model(teacher).tokenizer)
    other = tiny("mistral", tokenizer="pieces", vocab_size=max(size, 384))
    wide = deep(tiny, vocab_size=max(size, 384))
    with pytest.raises(WrongUse, match="does not split text"):
        lighten.distill(wide, other, text, **QUICK)
    short = tmp_path / "short.txt"
    short.write_text("A fox. " * 10)
    with pytest.raises(BadInput, match="too few to learn from"):
        lighten.distill(teacher, "half depth", short, **QUICK)
    with pytest.raises(WrongUse, match="the data is a Tensor"):
        lighten.distill(teacher, "half depth", torch.zeros(3), **QUICK)


def test_the_command_line(tiny: Tiny, text: Path, tmp_path: Path,
                          capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    out = tmp_path / "run"
    line = ["distill", str(deep(tiny)), "--student", "half depth", "--data", str(text), "--length",
            "6steps", "--window", "32", "--batch", "4", "--samples", "8", "--rate", "0.001",
            "--out", str(out)]  # fmt: skip
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["learning"][0]["steps"] == 6
    assert main(line) == 0
    assert "perplexity" in capsys.readouterr().out
    with pytest.raises(WrongUse, match="it has no plan"):
        lighten.replan(out, "80MB")
    exported = lighten.export(out, "gguf")
    assert len(open_model(exported).blocks) == 2
    shutil.rmtree(out / "model")
    with pytest.raises(WrongUse, match="is not finished"):
        lighten.export(out, "gguf")
