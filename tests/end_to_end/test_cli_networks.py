"""The command line on networks: what goes to stdout, exit codes, hints."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lighten import network_cost, network_structure, progress
from lighten.cli import main
from lighten.runtimes import onnxruntime
from small_networks import SIDE, images, labels, trained

needs_onnx = pytest.mark.skipif(not onnxruntime.available(), reason="onnxruntime is not installed")

MODEL = """
import torch
from torch import nn
from small_networks import Residual

def factory(classes=5):
    return Residual()

def broken():
    raise OSError("no such disk")

def number():
    return 3
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(network_cost, "SECONDS", 0.05)
    monkeypatch.setattr(network_cost, "SECONDS_A_TRY", 0.05)
    yield
    progress.be_quiet(False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, its weights and labelled data: the working directory."""
    module, x = trained(), images(64)
    (tmp_path / "net.py").write_text(MODEL)
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    np.savez(tmp_path / "data.npz", images=x.numpy(), labels=labels(module, x).numpy())
    monkeypatch.chdir(tmp_path)
    return tmp_path


LINE = ["compress", "net.py:factory", "--weights", "w.safetensors", "--data", "data.npz",
        "--size", str(SIDE)]  # fmt: skip


@needs_onnx
def test_compress(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    line = [*LINE, "--budget", "0.5 macs", "--json"]
    assert main(line) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["after"]["macs"] <= 0.5 * found["before"]["macs"]
    assert found["before"]["accuracy"]["value"] > 0.5, "the weights were not loaded"
    [file] = (here / "runs").glob("factory-*/exports/*.onnx")
    assert file.stat().st_size == found["after"]["bytes"]
    onnxruntime.check(file)
    assert main(line) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main(["report", str(file.parent.parent), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["after"] == found["after"]
    assert main([*LINE, "--budget", "0.5 macs", "--multiple", "4"]) == 2
    assert "multiple: 1 -> 4" in capsys.readouterr().err


def test_a_checkpoint_as_a_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*LINE, "--budget", "0.5 params", "--export", "checkpoint", "--out", "run"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "before" in out
    assert "file size" in out
    assert "allocated" in out
    assert (here / "run" / "exports" / "checkpoint").is_dir()


def test_inspect(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "net.py:factory", "--size", str(SIDE), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == sum(p.numel() for p in trained().parameters())
    assert found["macs"] > 0
    assert "conv1.weight" in json.dumps(found)
    assert main(["inspect", "net.py:factory", "--size", str(SIDE)]) == 0
    assert "conv1.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ([*LINE, "--budget", "0.5 mac5"], 2, "0.5 mac5"),
        ([*LINE, "--budget", "4bpw"], 2, "bits per weight"),
        ([*LINE, "--budget", "0.0001 macs", "--export", "checkpoint"], 2, "budget in macs"),
        ([*LINE, "--budget", "50% ms", "--export", "checkpoint"], 2, "checkpoint"),
        ([*LINE, "--budget", "0.5 macs", "--export", "onyx"], 2, "`onnx`"),
        ([*LINE, "--budget", "0.5 macs", "--quantize", "int7"], 2, "w4a8"),
        ([*LINE, "--budget", "0.5 macs", "--max-kld", "0.1"], 2, "language models"),
        ([*LINE[:4], "--budget", "0.5 macs"], 2, "--data"),
        (["compress", "net.py:factroy", *LINE[2:], "--budget", "0.5 macs"], 2, "`factory`"),
        (["compress", "nett.py:factory", *LINE[2:], "--budget", "0.5 macs"], 2, "nett.py"),
        (["compress", "net.py:number", *LINE[2:], "--budget", "0.5 macs"], 2, "int"),
        (["compress", "net.py:broken", *LINE[2:], "--budget", "0.5 macs"], 1, "no such disk"),
        ([*LINE[:3], "data.npz", *LINE[4:], "--budget", "0.5 macs"], 2, "data.npz"),
        ([*LINE[:5], "w.safetensors", "--size", "16", "--budget", "0.5 macs"], 1, "w.safetensors"),
        (["inspect", "net.py:factory"], 2, "--size"),
        (["compress", "gpt", "--budget", "9MB", "--quantize", "int8"], 2, "for networks"),
    ],
)
def test_a_mistake_is_two_lines(
    here: Path, capsys: pytest.CaptureFixture[str], line: list[str], code: int, said: str
) -> None:
    assert main(line) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "error: " in err
    assert "hint: " in err
    assert "Traceback" not in err


def test_stopped_says_how_to_go_on(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    line = [*LINE, "--budget", "0.5 macs", "--export", "checkpoint", "--out", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(network_structure, "compensate", stop)
        assert main(line) == 130
    err = capsys.readouterr().err
    assert "lighten compress net.py:factory" in err
    assert "'0.5 macs'" in err
    assert (here / "run" / "curves.safetensors").is_file()
    monkeypatch.setattr(network_structure, "curves", stop)  # it is not done again
    assert main(line) == 0


def test_a_result_that_is_worse_exits_1(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = network_cost.speeds

    def larger(export: str, files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
        found = speeds(export, files)
        for name, path in files.items():
            found[name]["bytes"] += 10**7 * ("exports" in str(path))
        return found

    monkeypatch.setattr(network_cost, "speeds", larger)
    line = [*LINE, "--budget", "0.9 macs", "--export", "checkpoint", "--json"]
    assert main(line) == 1
    out, err = capsys.readouterr()
    assert "larger than the input" in err
    assert json.loads(out)["problems"]
