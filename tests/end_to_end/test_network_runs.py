"""`lighten plan` and `lighten export` on runs of networks: opened again by what the run keeps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import lighten
from lighten import compress_network, errors, job, network_cost, network_structure, progress
from lighten.cli import main
from lighten.registry import exporters
from lighten.runtimes import onnxruntime
from small_networks import SIDE, Residual, images, labels, trained

X = images(96)

MODEL = """
from small_networks import Residual

def factory():
    return Residual()
"""

LINE = ["compress", "net.py:factory", "--weights", "w.safetensors", "--data", "data.npz",
        "--size", str(SIDE), "--out", "run"]  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    """No clock: on a busy machine a small file may seem slower than a large one."""
    steady = onnxruntime.Latency(0.1, 0.2, 0.3, 9, 10**8)
    monkeypatch.setattr(onnxruntime, "latency", lambda *_, **__: steady)
    monkeypatch.setattr(onnxruntime, "latencies", lambda files, **_: dict.fromkeys(files, steady))
    yield
    progress.be_quiet(False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, its weights and data: the working directory."""
    (tmp_path / "net.py").write_text(MODEL)
    save_file(trained().state_dict(), tmp_path / "w.safetensors")
    np.savez(tmp_path / "data.npz", images=X.numpy(), labels=labels(trained(), X).numpy())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*options: str) -> None:
    assert main([*LINE, *options]) == 0


def facts(capsys: pytest.CaptureFixture[str], *line: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*line, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def _work(*_: Any, **__: Any) -> Any:
    raise AssertionError("this is stored")


def idle(patch: pytest.MonkeyPatch) -> None:
    for module, names in {
        network_structure: ("curves", "compensate", "quality"),
        compress_network: ("quality",), job: ("all_outputs",), network_cost: ("speeds", "_p50"),
    }.items():  # fmt: skip
        for name in names:
            patch.setattr(module, name, _work)


# -- another budget ------------------------------------------------------------------------------
def test_another_budget_from_the_stored_curves(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("--budget", "0.5 macs", "--export", "checkpoint")
    whole = json.loads((here / "run/measured/original.json").read_text())
    idle(monkeypatch)
    found = {b: facts(capsys, "plan", "run", "--budget", b) for b in ("0.7 macs", "0.4 macs")}
    for budget, share in (("0.7 macs", 0.7), ("0.4 macs", 0.4)):
        assert 0.6 * share < found[budget]["predicted_macs"] / whole["macs"] <= share
        assert Path(found[budget]["plan"]).is_file()
        assert any(row["units"] < row["of"] for row in found[budget]["widths"])
    assert found["0.4 macs"]["predicted_kld"] > found["0.7 macs"]["predicted_kld"] > 0
    params = facts(capsys, "plan", "run", "--budget", "0.5 params")
    assert params["predicted_parameters"] <= 0.5 * whole["parameters"]
    all_of_it = facts(capsys, "plan", "run", "--budget", "1.0 macs")
    assert all(row["units"] == row["of"] for row in all_of_it["widths"])
    assert main(["plan", "run", "--budget", "0.001 macs"]) == 2
    assert "budget in macs" in capsys.readouterr().err
    assert main(["plan", "run", "--budget", "4bpw"]) == 2


def test_the_plan_is_what_compress_does(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--budget", "0.7 macs", "--export", "checkpoint")
    planned = facts(capsys, "plan", "run", "--budget", "0.5 macs")
    assert main([*LINE[:-1], "two", "--budget", "0.5 macs", "--export", "checkpoint"]) == 0
    stored = json.loads((here / "two/widths/allocated.json").read_text())
    assert {row["axis"]: row["units"] for row in planned["widths"]} == stored


def test_bytes_are_predicted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--budget", "0.5 macs", "--quantize", "none")
    before = json.loads((here / "run/measured/original.json").read_text())["bytes"]
    found = facts(capsys, "plan", "run", "--budget", "80%")
    assert found["predicted_bytes"] <= 0.8 * before
    line = [*LINE[:-1], "two", "--budget", "80%", "--quantize", "none"]
    made = facts(capsys, *line)
    assert made["after"]["bytes"] == pytest.approx(found["predicted_bytes"], rel=0.1)


# -- another file --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "to"),
    [
        (["--budget", "0.5 macs"], "checkpoint"),
        (["--budget", "0.5 macs", "--export", "checkpoint"], "onnx"),
        (["--quantize", "int8"], "checkpoint"),
        (["--sparsity", "0.5"], "checkpoint"),
        (["--sparsity", "0.5", "--export", "checkpoint"], "onnx"),
        (["--sparsity", "0.5", "--quantize", "int8"], "checkpoint"),
        pytest.param(
            ["--sparsity", "0.5", "--quantize", "w4", "--export", "checkpoint"],
            "onnx",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--sparsity", "2:4", "--quantize", "mixed", "--budget", "20%"],
            "checkpoint",
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, list) else value,
)
def test_another_file_of_the_same_network(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    options: list[str], to: str,
) -> None:  # fmt: skip
    run(*options)
    [first] = (p for p in (here / "run/exports").iterdir() if p.name != "README.md")
    metrics = (here / "run/metrics.json").read_bytes()
    idle(monkeypatch)
    capsys.readouterr()
    assert main(["export", "run", "--to", to]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.exists()
    assert path != first
    card = (here / "run/exports/README.md").read_text(encoding="utf-8")
    assert all(f"'{name}'" in card for name in (path.name, first.name))
    assert (here / "run/metrics.json").read_bytes() == metrics
    names = {"checkpoint": path, "onnx": first} if to == "checkpoint" else {
        "checkpoint": first, "onnx": path}  # fmt: skip
    stored, file = (exporters[name].read(names[name]) for name in ("checkpoint", "onnx"))
    same = [n for n, t in stored.items() if n in file and t.shape == file[n].shape and t.dim() > 1]
    assert same
    for name in same:  # the float exporter folds batch norms, and so has other numbers
        if "quantize" in "".join(options):
            assert torch.equal(stored[name], file[name]), name
    onnxruntime.check(names["onnx"])
    opened = lighten.load(Residual, names["checkpoint"])
    [found] = onnxruntime.run(names["onnx"], X[:8])
    with torch.no_grad():
        near = (opened(X[:8]) - found).abs().max() / found.abs().max()
    # of what rounds tensors, some lie between two codes
    assert float(near) < (0.02 if "quantize" in "".join(options) else 1e-4)
    if "--sparsity" in options:
        for tensors in (stored, file):
            zeros = [float((t == 0).float().mean()) for t in tensors.values() if t.dim() > 1]
            assert max(zeros) >= 0.5
        rows = json.loads((here / "run/look/layers.json").read_text())
        assert any(0.5 <= (row["sparsity"] or 0) < 0.6 for row in rows)
    assert main(["export", "run", "--to", to]) == 0


def test_what_cannot_be_exported(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--budget", "0.5 macs", "--export", "checkpoint")
    assert main(["export", "run", "--to", "gguf"]) == 2
    assert main(["export", "run", "--to", "onxx"]) == 2
    assert "did you mean `onnx`" in capsys.readouterr().err
    save_file(trained(seed=3).state_dict(), here / "w.safetensors")
    for line in (["export", "run", "--to", "onnx"], ["plan", "run", "--budget", "0.6 macs"]):
        assert main(line) == 2
        assert "it has changed" in capsys.readouterr().err


def test_a_run_of_a_module_in_memory_says_what_to_do(tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": X, "budget": "0.5 macs", "out": tmp_path / "run"}
    first = lighten.compress(trained(), X[:2], export="checkpoint", **options)
    for ask in (lambda: lighten.export(first.run, "onnx"),
                lambda: lighten.replan(first.run, "0.4 macs")):  # fmt: skip
        with pytest.raises(errors.WrongUse, match="module in memory"):
            ask()
    again = lighten.compress(trained(), X[:2], export="checkpoint", also="onnx", **options)
    [found] = onnxruntime.run(again.exported, X[:4])
    torch.testing.assert_close(found, again.module(X[:4]), rtol=1e-4, atol=1e-5)


def test_an_unfinished_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--quantize", "int8")
    assert main(["plan", "run", "--budget", "0.5 macs"]) == 2
    assert "no curves" in capsys.readouterr().err
    (here / "run/metrics.json").unlink()
    assert main(["export", "run", "--to", "checkpoint"]) == 2
    assert "not finished" in capsys.readouterr().err
