"""compress() from end to end on tiny models: budgets, exports, resuming, refusals."""

from __future__ import annotations

import json
import os
import shutil
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
from lighten.cli import main
from lighten.language_job import job_of
from lighten.registry import exporters
from lighten.results import results  # noqa: F401  (imported before anything is replaced in it)
from lighten.run import Run
from lighten.runtimes import llama_cpp
from lighten.solve import Weights

Tiny = Callable[..., Path]
SMALL: dict[str, Any] = {"samples": 4, "length": 32}
KILLER = Path(__file__).with_name("killed_run.py")


pytestmark = pytest.mark.usefixtures("untimed")


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


def test_the_same_wish_in_other_words_is_the_same(
    done: pipeline.Result, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(_source(done)).parent)
    relative = Path(_source(done)).name
    again = lighten.compress(relative, budget="60 %", data=text, out=done.run, **SMALL)
    assert again.metrics == done.metrics


def test_a_model_that_has_changed_since_is_refused(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    """Its other tensors would go beside weights that were solved for the model that was."""
    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny("llama"), model)
    lighten.compress(model, budget="60%", data=text, out=out, **SMALL)
    shutil.rmtree(model)
    shutil.copytree(tiny("llama", seed=5), model)
    for ask in (lambda: lighten.export(out, "huggingface"), lambda: lighten.replan(out, "70%")):
        with pytest.raises(errors.WrongUse, match="has changed since"):
            ask()
    with pytest.raises(errors.ChangedRequest, match="model: "):
        lighten.compress(model, budget="60%", data=text, out=out, **SMALL)


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


STAGES = [
    "model/",  # the sensitivity pass has ended, its candidates are not stored
    "weights/",  # before the first weight
    "layers.1.mlp.up_proj",  # in the middle of a block that shares its input with another weight
    "model/reference",  # everything is solved, nothing measured
    "measured/allocated",
    "measured/uniform",
    "plan.json",
    "verify",  # the export is written, but not in its place
    "exports/",
    "metrics.json",
]


@pytest.fixture(scope="module")
def killed(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stage -> the folder of a run that was killed there."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, KILLER, tiny("llama"), text, folder, *STAGES]
    found = subprocess.run([str(c) for c in command], capture_output=True, timeout=300)
    assert found.returncode == 0, found.stderr.decode()
    return {key: folder / str(i) / "run" for i, key in enumerate(STAGES)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("key", STAGES)
def test_killed_and_resumed_it_makes_the_same_bytes(
    tiny: Tiny, text: Path, done: pipeline.Result, killed: dict[str, Path], key: str
) -> None:
    out = killed[key]
    assert not (out / "metrics.json").exists()
    assert not list(out.glob("exports/*")) or key == "metrics.json"
    found = lighten.compress(tiny("llama"), budget="60%", data=text, out=out, **SMALL)
    assert found.exported.read_bytes() == done.exported.read_bytes()
    assert found.metrics == done.metrics
    assert _files(out) == _files(done.run)


def test_what_was_removed_or_changed_is_made_again(
    tiny: Tiny, text: Path, done: pipeline.Result, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(done.run, out)
    shutil.rmtree(out / "exports")
    weights = sorted((out / "weights").rglob("*.safetensors"))
    used = [p for p in weights if p.parent.name == _weights_of(done)]
    used[0].unlink()
    used[-1].write_bytes(used[-1].read_bytes()[:-1])
    with pytest.raises(errors.WrongUse, match=r"2 weights of .* are gone or changed"):
        lighten.export(out, "huggingface")
    found = lighten.compress(tiny("llama"), budget="60%", data=text, out=out, **SMALL)
    assert found.exported.read_bytes() == done.exported.read_bytes()
    assert lighten.export(out, "huggingface").is_dir()


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
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(errors.BadInput, match=name):
        lighten.compress(folder, budget="60%", data=text, out=tmp_path / "run", **SMALL)


def test_what_a_run_cannot_be_asked_for(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def asked(family: str = "llama", **wish: Any) -> None:
        lighten.compress(tiny(family), data=text, out=out, **(SMALL | wish))

    for loss in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(errors.WrongUse, match="max_kld"):
            asked(max_kld=loss)
    with pytest.raises(errors.WrongUse, match="0 windows"):
        asked(budget="60%", samples=0)
    with pytest.raises(errors.WrongUse, match=r"512 tokens.* takes no more than 128") as caught:
        asked("gpt2", budget="60%", length=512)
    assert "--length 128" in caught.value.hint
    with pytest.raises(errors.WrongUse, match="cannot hold this model") as caught:
        asked("gpt2", budget="60%", export="compressed_tensors")
    assert "gguf, huggingface" in caught.value.hint
    few = tmp_path / "few.txt"
    few.write_text("Only some words, enough for a single window and no more.")
    with pytest.raises(errors.WrongUse, match="1 window of 32 tokens"):
        lighten.compress(tiny("llama"), budget="60%", data=few, out=out, **SMALL)
    assert not list(out.rglob("*.safetensors"))


def test_a_plan_that_another_form_cannot_hold(done: pipeline.Result) -> None:
    with pytest.raises(errors.WrongUse, match="cannot be written in packed form"):
        lighten.export(done.run, "compressed_tensors")
    assert not (done.run / "exports/compressed_tensors").exists()
    with pytest.raises(errors.UnknownName) as caught:
        lighten.export(done.run, "hugginface")
    assert "`huggingface`" in caught.value.hint
    with pytest.raises(errors.WrongUse, match="is not a run"):
        lighten.export(done.run / "exports", "gguf")


@pytest.mark.parametrize("budget", ["150kB", "9.5bpw", "0.16MiB"])
def test_budgets_of_every_kind(tiny: Tiny, text: Path, tmp_path: Path, budget: str) -> None:
    model = lighten.open_model(tiny("llama"))
    found = lighten.compress(tiny("llama"), budget=budget, data=text, out=tmp_path / "r", **SMALL)
    limit = lighten.Budget.parse(budget).limit(model.parameters, 0)
    assert 0.9 * limit < size(found.exported) <= limit


@pytest.mark.parametrize(("loss", "smallest"), [(1e-9, False), (1e3, True)])
def test_losses_that_ask_for_everything_or_nothing(
    tiny: Tiny, text: Path, tmp_path: Path, loss: float, smallest: bool
) -> None:
    found = lighten.compress(tiny("llama"), max_kld=loss, data=text, out=tmp_path / "r", **SMALL)
    assert found.metrics["after"]["mean_kld"]["value"] <= loss
    rows = Run.at(found.run, lock=False).read("candidates")
    least = sum(
        min(r["cost"]["bytes"] for r in rows if r["unit"] == unit)
        for unit in {r["unit"] for r in rows}
    )
    kept = exporters["gguf"].nbytes(lighten.open_model(tiny("llama")), {})
    fixed = exporters["gguf"].fixed_bytes(lighten.open_model(tiny("llama")))
    assert (size(found.exported) <= least + fixed) == smallest
    assert size(found.exported) <= kept


def test_as_many_windows_as_were_asked_for(tiny: Tiny, text: Path) -> None:
    model, corpus = lighten.open_model(tiny("llama")), lighten.load_text(text)
    made: Any = job_of(None, model, corpus, None, 4, 32, 0)  # type: ignore[arg-type]
    assert made.calibration.shape == (4, 32)
    assert made.held_out.shape == (16, 32)
    stream = torch.cat([made.calibration, made.held_out]).flatten()
    longer: Any = job_of(None, model, corpus, None, 30, 32, 0)  # type: ignore[arg-type]
    assert torch.equal(longer.calibration.flatten()[: len(stream)], stream)  # nothing seen twice
    everything: Any = job_of(None, model, corpus, None, 10**6, 32, 0)  # type: ignore[arg-type]
    assert len(everything.held_out) == 16
    assert len(everything.calibration) > 60


def test_the_command_line(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    """In processes of its own, with llama.cpp timed: what stands on stdout, and how it ends."""

    def lighten_(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lighten.cli", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=200)

    run = tmp_path / "run"
    model = tiny("llama", max_position_embeddings=64)
    small = ("--samples", "4", "--length", "32", "--data", text)
    found = lighten_("compress", model, "--budget", "60%", "--out", run, "--json", *small)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["after"]["bytes"] > 0
    wrong = lighten_("compress", model, "--budget", "lots", "--out", run)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "hint:" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_the_other_verbs(
    tiny: Tiny, text: Path, done: pipeline.Result, capfd: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str | Path, code: int = 0) -> str:
        assert main([str(w) for w in words]) == code
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return out

    planned = json.loads(said("plan", done.run, "--budget", "70%", "--json"))
    assert planned["predicted_bytes"] <= 0.7 * exporters["gguf"].nbytes(
        lighten.open_model(tiny("llama")), {}
    )
    assert Path(planned["plan"]).is_file()
    assert "mean kld" in said("report", done.run)
    report = json.loads(said("report", done.run, "--json"))
    assert report["after"] == json.loads(json.dumps(done.metrics["after"]))
    assert {row["stage"] for row in report["stages"]} >= {"weights", "exports", "metrics.json"}
    exported = said("export", done.run, "--to", "huggingface").strip()
    small = ("--samples", "3", "--length", "32", "--data", text, "--json")
    facts = {}
    for name, path in (("gguf", done.exported), ("folder", exported)):
        words = ("measure", path, "--against", tiny("llama"), *small)
        facts[name] = json.loads(said(*words))["measured"]
        assert facts[name]["bytes"] > 0
    # the same numbers from the file as from the dense folder: nothing was lost on the way
    for key in ("mean_kld", "perplexity"):
        assert facts["gguf"][key]["value"] == pytest.approx(facts["folder"][key]["value"], rel=0.02)
    assert facts["gguf"]["mean_kld"]["value"] > 0
    inside = json.loads(said("inspect", done.exported, "--json"))
    assert inside
    assert "gptq" in said("list", "solvers")
    assert said("plan", done.run, "--budget", "1kB", code=2) == ""
    assert said("report", text, code=2) == ""


def _source(done: pipeline.Result) -> str:
    request = json.loads((done.run / "request.json").read_text())
    return str(request["source"])


def _weights_of(done: pipeline.Result) -> str:
    """The folder of the weights that the chosen plan uses."""
    run = Run.at(done.run, lock=False)
    return Path(Weights(run, lighten.open_model(_source(done)), done.plan).folder).name


def _files(folder: Path) -> dict[str, bytes]:
    """Every result in a run, but for those that `export` and `plan` add to a finished one."""
    stages = ("weights", "model", "measured", "candidates.jsonl", "plan.json", "metrics.json")
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for stage in stages
        for p in ([folder / stage] if "." in stage else sorted((folder / stage).rglob("*")))
        if p.is_file()
    }
