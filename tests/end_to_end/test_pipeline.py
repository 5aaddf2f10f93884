"""compress() from end to end on tiny models: budgets, exports, resuming, refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lighten
from lighten import errors, pipeline
from lighten.registry import exporters
from lighten.results import results  # noqa: F401  (imported before anything is replaced in it)
from lighten.runtimes import llama_cpp

Tiny = Callable[..., Path]
SMALL: dict[str, Any] = {"samples": 4, "length": 32}
KILLER = Path(__file__).with_name("killed_run.py")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp opens every export, but is not timed."""
    monkeypatch.setattr(llama_cpp, "speed", lambda path, **_: llama_cpp.Speed(1.0, 2.0, 3.0, 4))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (f"Line {i}: the {w} fox sees {i * i} birds." for i, w in enumerate(["quick"] * 200))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def done(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Result:
    out = tmp_path_factory.mktemp("done") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "speed", lambda path, **_: llama_cpp.Speed(1.0, 2.0, 3.0, 4))
        return lighten.compress(tiny("llama"), budget="60%", data=text, out=out, **SMALL)


def size(path: Path) -> int:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(p.stat().st_size for p in files)


def test_the_file_fits_and_the_facts_are_those_of_the_file(done: pipeline.Result) -> None:
    whole = exporters["gguf"].nbytes(lighten.open_model(_source(done)), {})
    assert size(done.exported) <= 0.6 * whole
    assert done.metrics["after"]["bytes"] == size(done.exported)
    assert done.metrics["after"]["mean_kld"]["value"] > 0
    assert not done.metrics["problems"]
    plans = {row["plan"]: row["mean_kld"]["value"] for row in done.metrics["plans"]}
    assert done.metrics["after"]["mean_kld"]["value"] == min(plans.values())
    assert set(plans) >= {"allocated"}
    if llama_cpp.available():
        llama_cpp.check(done.exported)


def test_the_same_line_again_does_nothing(
    done: pipeline.Result, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = done.exported.read_bytes()
    monkeypatch.setattr(pipeline, "solve", None)
    monkeypatch.setattr(pipeline, "sensitivities", None)
    again = lighten.compress(_source(done), budget="60%", data=text, out=done.run, **SMALL)
    assert again.metrics == done.metrics
    assert again.exported.read_bytes() == before


def test_another_request_is_refused(done: pipeline.Result, text: Path) -> None:
    with pytest.raises(errors.ChangedRequest, match="another request"):
        lighten.compress(_source(done), budget="70%", data=text, out=done.run, **SMALL)


def test_another_budget_is_planned_and_an_impossible_one_says_the_smallest(
    done: pipeline.Result,
) -> None:
    found = lighten.replan(done.run, "70%")
    assert found["predicted_bytes"] > done.plan.predicted["bytes"]
    assert found["predicted_kld"] < done.plan.predicted["nats"]
    with pytest.raises(errors.ImpossibleBudget, match="smallest"):
        lighten.replan(done.run, "1kB")


@pytest.mark.parametrize("to", ["huggingface", "gguf"])
def test_a_finished_run_is_exported_elsewhere(done: pipeline.Result, to: str) -> None:
    path = lighten.export(done.run, to)
    assert size(path) == exporters[to].nbytes(
        lighten.open_model(_source(done)),
        {k: lighten.Spec.parse(v) for k, v in done.plan.specs.items()},
    )


@pytest.mark.parametrize(
    ("family", "export", "budget"),
    [
        ("gpt2", "gguf", "9bpw"),
        ("gemma3_text", "gguf", "50%"),
        ("llama", "compressed_tensors", "75%"),
        ("qwen2", "huggingface", "100%"),
    ],
)
def test_families_and_exports(
    tiny: Tiny, text: Path, tmp_path: Path, family: str, export: str, budget: str
) -> None:
    out = tmp_path / "run"
    found = lighten.compress(
        tiny(family), budget=budget, data=text, export=export, out=out, **SMALL
    )
    model = lighten.open_model(tiny(family))
    whole = exporters[export].nbytes(model, {})
    limit = lighten.Budget.parse(budget).limit(model.parameters, whole)
    assert size(found.exported) <= limit


def test_a_gguf_in_a_smaller_gguf_out(done: pipeline.Result, text: Path, tmp_path: Path) -> None:
    found = lighten.compress(done.exported, budget="90%", data=text, out=tmp_path / "r", **SMALL)
    assert size(found.exported) <= 0.9 * size(done.exported)
    kept = lighten.open_model(found.exported)
    assert kept.gguf is not None
    assert kept.tokenizer("a fox").input_ids == lighten.open_model(
        done.exported
    ).tokenizer("a fox").input_ids  # fmt: skip


def test_the_smallest_model_that_keeps_a_loss(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    found = lighten.compress(tiny("llama"), max_kld=0.02, data=text, out=tmp_path / "r", **SMALL)
    assert found.metrics["after"]["mean_kld"]["value"] <= 0.02
    assert size(found.exported) < exporters["gguf"].nbytes(lighten.open_model(tiny("llama")), {})


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
@pytest.mark.parametrize(
    "key",
    [
        "model/",  # the sensitivity pass has ended, its candidates are not stored
        "weights/",  # before the first weight
        "model/reference",  # everything is solved, nothing measured
        "measured/allocated",
        "measured/uniform",
        "plan.json",
        "exports/",
        "metrics.json",
    ],
)
def test_killed_and_resumed_it_makes_the_same_bytes(
    tiny: Tiny, text: Path, done: pipeline.Result, tmp_path: Path, key: str
) -> None:
    out = tmp_path / done.run.name
    command = [sys.executable, KILLER, tiny("llama"), text, out, key]
    killed = subprocess.run([str(c) for c in command], capture_output=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    found = lighten.compress(tiny("llama"), budget="60%", data=text, out=out, **SMALL)
    assert found.exported.read_bytes() == done.exported.read_bytes()
    assert found.metrics == done.metrics


def test_mistakes_are_told(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(errors.UnknownName, match="gguff"):
        lighten.compress(model, budget="50%", data=text, export="gguff", out=tmp_path / "a")
    with pytest.raises(errors.WrongUse, match="budget"):
        lighten.compress(model, data=text, out=tmp_path / "a")
    with pytest.raises(errors.ImpossibleBudget, match="smallest"):
        lighten.compress(model, budget="1kB", data=text, out=tmp_path / "a", **SMALL)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(errors.BadInput):
        lighten.compress(model, budget="50%", data=tmp_path / "empty.txt", out=tmp_path / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UserError):
        lighten.compress(model, budget="50%", data=text, out=tmp_path / "file" / "run")


def test_a_weight_that_is_nan_is_named(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(errors.BadInput, match=name):
        lighten.compress(folder, budget="60%", data=text, out=tmp_path / "run", **SMALL)


def test_the_command_line(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    def lighten_(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lighten.cli", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=200)

    run = tmp_path / "run"
    model = tiny("llama", max_position_embeddings=64)
    small = ("--samples", "4", "--length", "32", "--data", text)
    found = lighten_("compress", model, "--budget", "60%", "--out", run, "--json", *small)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["after"]["bytes"] > 0
    assert lighten_("plan", run, "--budget", "70%").returncode == 0
    report = lighten_("report", run)
    assert report.returncode == 0
    assert "mean kld" in report.stdout
    exported = lighten_("export", run, "--to", "huggingface")
    assert Path(exported.stdout.strip()).is_dir()
    wrong = lighten_("compress", model, "--budget", "lots", "--out", run)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "hint:" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def _source(done: pipeline.Result) -> str:
    request = json.loads((done.run / "request.json").read_text())
    return str(request["source"])
