"""`lighten measure` on networks and ONNX files: both sides, any pair, the same examples."""

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
from lighten import errors, front_measure, network_cost, progress
from lighten.cli import main
from lighten.runtimes import onnxruntime
from small_networks import SIDE, images, labels, trained

X = images(80)
Y = labels(trained(), X)

MODEL = """
from small_networks import Residual

def factory():
    return Residual()
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(network_cost, "SECONDS", 0.05)
    yield
    progress.be_quiet(False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, its weights, labelled data and an int8 file."""
    module = trained()
    (tmp_path / "net.py").write_text(MODEL)
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    np.savez(tmp_path / "data.npz", images=X.numpy(), labels=Y.numpy())
    made = lighten.quantize(module, X[:2], data=images(40, seed=5))
    lighten.write_onnx(made, tmp_path / "int8.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def facts(capsys: pytest.CaptureFixture[str], *line: str) -> dict[str, Any]:
    assert main(["measure", *line, "--data", "data.npz", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_file_beside_the_network_it_was_made_of(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = facts(
        capsys, "int8.onnx", "--against", "net.py:factory", "--weights", "w.safetensors",
        "--size", str(SIDE),
    )  # fmt: skip
    measured, reference = found["measured"], found["reference"]
    assert measured["bytes"] == Path("int8.onnx").stat().st_size
    assert 0 < measured["p50_ms"] <= measured["p90_ms"] <= measured["p99_ms"]
    assert measured["peak_memory_bytes"] > 10**6
    assert reference["accuracy"]["value"] == pytest.approx(0.75), "the weights were not loaded"
    [codes] = onnxruntime.run("int8.onnx", X)
    same = (codes.argmax(1) == trained()(X).argmax(1)).float().mean()
    right = (codes.argmax(1) == Y).float().mean()
    assert measured["top1_agreement"]["value"] == pytest.approx(float(same))
    assert measured["accuracy"]["value"] == pytest.approx(float(right))
    assert 0 < measured["mean_kld"]["value"] < 0.2
    assert measured["mean_kld"]["low"] <= measured["mean_kld"]["value"]
    assert found["examples"] == 80
    assert found["notes"] == []


def test_a_network_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["net.py:factory", "--weights", "w.safetensors", "--size", str(SIDE)]
    found = facts(capsys, *line)
    assert found["measured"]["accuracy"]["value"] == pytest.approx(0.75)
    assert found["measured"]["macs"] > 0
    assert found["measured"]["parameters"] == sum(p.numel() for p in trained().parameters())
    assert found["against"] is None
    assert "reference" not in found
    few = facts(capsys, *line, "--samples", "30")
    assert few["examples"] == 30
    assert "30 of 80" in " ".join(few["notes"])
    assert main(["measure", *line, "--data", "data.npz"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_two_networks_have_weights_of_their_own(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(trained(seed=4).state_dict(), here / "other.safetensors")
    line = ["net.py:factory", "--weights", "other.safetensors", "--against", "net.py:factory",
            "--against-weights", "w.safetensors", "--size", str(SIDE)]  # fmt: skip
    found = facts(capsys, *line)
    assert found["reference"]["accuracy"]["value"] == pytest.approx(0.75)
    other = (trained(seed=4)(X).argmax(1) == Y).float().mean()
    assert found["measured"]["accuracy"]["value"] == pytest.approx(float(other))


def test_two_files_and_one_that_takes_one_image_only(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx

    model = onnx.load("int8.onnx")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3  # 80 is no multiple of it
    del model.graph.value_info[:]
    onnx.save(model, "three.onnx")
    found = facts(capsys, "three.onnx", "--against", "int8.onnx")
    assert found["examples"] == 80
    assert found["measured"]["top1_agreement"]["value"] == 1
    assert found["measured"]["mean_kld"]["value"] < 1e-6
    assert found["reference"]["p50_ms"] > 0


def test_from_python_with_modules_and_tensors(here: Path) -> None:
    found = front_measure.measure(trained(), X[:2], against=here / "int8.onnx", data=X)
    assert "accuracy" not in found["measured"]
    assert found["measured"]["top1_agreement"]["value"] > 0.8
    alone = front_measure.measure(here / "int8.onnx", data=X)
    assert "only costs" in " ".join(alone["notes"])
    assert {"bytes", "p50_ms"} <= set(alone["measured"])


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (["int8.onnx"], 2, "--data"),
        (["none.onnx", "--data", "data.npz"], 1, "none.onnx"),
        (["w.onnx", "--data", "data.npz"], 1, "w.onnx"),
        (["int8.onnx", "--data", "small.npz"], 2, "--size"),
        (["int8.onnx", "--data", "data.npz", "--against", "model.gguf"], 2, "language model"),
        (["model.gguf", "--weights", "w.safetensors"], 2, "weights is for networks"),
        (["int8.onnx", "--data", "data.npz", "--against", "net.py:facory", "--size", "16"], 2,
         "`factory`"),
    ],
)  # fmt: skip
def test_mistakes(
    here: Path, capsys: pytest.CaptureFixture[str], line: list[str], code: int, said: str
) -> None:
    np.savez("small.npz", images=X[:, :, :8, :8].numpy())
    Path("w.onnx").write_bytes(b"no file of onnx")
    assert main(["measure", *line]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "Traceback" not in err


def test_numbers_that_are_none_are_refused(here: Path) -> None:
    with pytest.raises(errors.WrongUse, match="0 examples"):
        front_measure.measure("int8.onnx", data=X, samples=0)
    with pytest.raises(errors.BadInput, match="NaN"):
        front_measure.measure("int8.onnx", data=torch.full_like(X, float("nan")))
