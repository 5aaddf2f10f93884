"""Scales of integers that learn in a run: what each step did, kills, the file, and mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

pytest.importorskip("lightning", reason="learning needs lightning")
pytest.importorskip("onnxscript", reason="exporting needs onnxscript")
pytest.importorskip("onnxruntime", reason="the file is opened")
pytest.importorskip("onnx", reason="exporting needs onnx")

from lighten import front, job, learn_quantized, progress, scales_stage
from lighten.cli import main
from lighten.errors import ChangedRequest, WrongUse
from lighten.mirrored import Mirrored
from lighten.quantized import Quantized
from lighten.runtimes import onnxruntime
from lighten.trainable import trainable
from small_networks import SIDE, images, labels, trained

KILLER = Path(__file__).with_name("killed_distillation.py")
X = images(160)
Y = labels(trained(), X)
TIMES = {"seconds", "minutes", "p50_ms", "p99_ms", "peak_memory_bytes", "load_seconds"}


@pytest.fixture(autouse=True)
def _as_it_was(one_thread: None) -> Iterator[None]:
    yield
    progress.be_quiet(False)


def lossy() -> nn.Module:
    module = trained()
    with torch.no_grad():
        module.head.weight.mul_(10)  # so that there is something to lose
    return module


def compress(out: Path, **options: Any) -> Any:
    asked: dict[str, Any] = {
        "data": images(240), "test": X[:100], "budget": "0.5 macs", "quantize": "w4a8",
        "samples": 64, "recover": "2epochs", "augment": "none",
    }  # fmt: skip
    return front.compress(lossy(), X[:2], out=out, **(asked | options))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same run, its integers as they are rounded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = compress(tmp_path_factory.mktemp("plain") / "run", learn="none")
    torch.set_num_threads(threads)
    return found


def off(made: Quantized) -> Quantized:
    """Steps and biases some per cent off, at random: there is something to learn."""
    twin = trainable(made, "scales")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in twin.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)
    return twin.freeze()


def form(path: Path) -> Any:
    """A file without its numbers: operators, names, types and shapes."""
    import onnx

    graph = onnx.load(path).graph
    return (
        [(n.op_type, list(n.input), list(n.output)) for n in graph.node],
        [(t.name, t.data_type, list(t.dims)) for t in graph.initializer],
    )


def kld(found: Any) -> dict[str, float]:
    return {r["step"]: r["mean_kld"]["value"] for r in found.metrics["steps"] if "mean_kld" in r}


def never(*_: object, **__: object) -> None:
    raise AssertionError("it was there already")


def test_one_line_prunes_recovers_quantizes_and_recovers_scales(
    tmp_path: Path, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [row["step"] for row in plain.metrics["steps"]] == [
        "original", "pruned", "recovered", "exported"
    ]  # fmt: skip
    learn, quantize = learn_quantized.learned_twin, job.quantize_network
    monkeypatch.setattr(job, "quantize_network", lambda *a, **o: off(quantize(*a, **o)))
    monkeypatch.setattr(scales_stage, "learned_twin", partial(learn, rate=2e-3))
    found = compress(tmp_path / "run", learn="60steps")
    assert [row["step"] for row in found.metrics["steps"]] == [
        "original", "pruned", "recovered", "quantized", "scales recovered", "exported"
    ]  # fmt: skip
    values = kld(found)
    assert values["scales recovered"] < values["quantized"]
    assert values["exported"] == values["scales recovered"]
    first, second = found.metrics["recover"]
    assert (first["what"], second["what"]) == ("weights", "scales")
    assert second["taken"] == "yes"
    assert (second["length"], second["steps"]) == ("60steps", 60)
    assert form(found.exported) == form(plain.exported)
    assert found.exported.read_bytes() != plain.exported.read_bytes()
    outputs = onnxruntime.run(found.exported, X[:8])[0]
    assert outputs.shape == (8, 5)
    assert list((tmp_path / "run" / "recover").glob("learning-scales-*/history.jsonl"))
    assert not list((tmp_path / "run").rglob("step-*"))
    # all is stored but the rounding
    (tmp_path / "run" / "metrics.json").unlink()
    monkeypatch.setattr(scales_stage, "learned_twin", never)
    again = compress(tmp_path / "run", learn="60steps")
    assert again.metrics["steps"] == found.metrics["steps"]
    assert again.exported.read_bytes() == found.exported.read_bytes()
    with pytest.raises(ChangedRequest, match="another request") as error:
        compress(tmp_path / "run", learn="61steps")
    assert "learn.length" in error.value.hint


def test_what_measures_worse_is_not_taken(
    tmp_path: Path, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = learn_quantized.learned_twin

    def spoiled(*arguments: Any, **options: Any) -> Any:
        twin, metrics = original(*arguments, **options)
        with torch.no_grad():
            for part in twin.floats.values():
                part.add_(torch.arange(float(len(part))))
        return twin, metrics

    monkeypatch.setattr(scales_stage, "learned_twin", spoiled)
    found = compress(tmp_path / "run")
    assert found.metrics["recover"][1]["taken"] == "no"
    values = kld(found)
    assert values["scales recovered"] > values["quantized"] == values["exported"]
    assert found.exported.read_bytes() == plain.exported.read_bytes()


def test_integers_learn_without_a_recovery_on_what_they_are_not_chosen_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    learned, quantize = learn_quantized.learned_twin, job.quantize_network

    def learn(made: Quantized, teacher: Any, data: Any, **options: Any) -> Any:
        given.append(data.held_out)
        return learned(made, teacher, data, **options)

    def round(network: Any, data: torch.Tensor, **options: Any) -> Quantized:
        given.append(data)
        return quantize(network, data, **options)

    monkeypatch.setattr(scales_stage, "learned_twin", learn)
    monkeypatch.setattr(job, "quantize_network", round)
    asked: dict[str, Any] = {"budget": None, "recover": None, "test": None, "data": (X, Y)}
    found = compress(tmp_path / "run", learn="20steps", learn_codes=True, samples=1024, **asked)
    assert [row["step"] for row in found.metrics["steps"]] == [
        "original", "quantized", "scales recovered", "exported"
    ]  # fmt: skip
    (row,) = found.metrics["recover"]
    assert (row["what"], row["length"]) == ("scales and codes", "20steps")
    assert "accuracy" in found.metrics["steps"][0]
    calibrated, chosen_by = ({tuple(x.flatten()[:5].tolist()) for x in part} for part in given[-2:])
    assert chosen_by
    assert not chosen_by & calibrated


def test_formats_of_layers_learn_too(
    tmp_path: Path, undocumented: Callable[[Path], set[str]]
) -> None:
    found = compress(tmp_path / "run", budget="60%", quantize=None, recover="4steps")
    assert found.metrics["after"]["bytes"] <= 0.6 * found.metrics["before"]["bytes"]
    assert "scales recovered" in kld(found)
    # of a recovery, as many steps
    assert [row["length"] for row in found.metrics["recover"]] == ["4steps", "4steps"]
    assert not undocumented(tmp_path / "run")


@pytest.mark.parametrize("mirrored", [None, False])
def test_integers_are_taught_as_the_weights_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirrored: bool | None
) -> None:
    taught: list[Any] = []
    learn = learn_quantized.learn

    def seen(student: Any, teacher: Any, *rest: Any, **options: Any) -> Any:
        taught.append(isinstance(teacher, Mirrored))
        return learn(student, teacher, *rest, **options)

    monkeypatch.setattr(learn_quantized, "learn", seen)
    found = compress(tmp_path / "run", recover="3steps", augment="flip", mirrored=mirrored)
    twice = mirrored is None
    assert taught == [twice]
    assert [row["mirrored"] for row in found.metrics["recover"]] == [twice, twice]


def test_weights_alone_learn_in_the_checkpoint(tmp_path: Path) -> None:
    found = compress(tmp_path / "run", quantize="w4", export="checkpoint", recover="3steps")
    assert found.metrics["recover"][1]["what"] == "scales"


# -- the command line, and kills -------------------------------------------------------------------
LINE = [
    "compress", "net.py:factory", "--weights", "w.safetensors", "--data", "data.npz", "--size",
    str(SIDE), "--mean", "half", "--std", "half", "--budget", "0.5macs", "--quantize", "w4a8",
    "--recover", "20steps", "--augment", "none", "--learn", "20steps", "--learn-codes", "--json",
    "--quiet",
]  # fmt: skip


def timeless(value: Any) -> Any:
    """Facts without what a clock says, and without what follows from it."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES | {"problems"}}
    return [timeless(v) for v in value] if isinstance(value, list) else value


@pytest.mark.slow  # test_learn.py kills trainings, test_recover.py stops recoveries
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_anywhere_it_goes_on_to_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna", reason="the script that kills imports it")
    (tmp_path / "net.py").write_text("from small_networks import Residual as factory\n")
    save_file(lossy().state_dict(), tmp_path / "w.safetensors")
    pixels = (64 * images(150) + 128).clamp(0, 255).byte().permute(0, 2, 3, 1)
    np.savez(tmp_path / "data.npz", images=pixels.numpy(), labels=Y[:150].numpy())
    monkeypatch.chdir(tmp_path)
    assert main([*LINE, "--out", "whole"]) in (0, 1)  # 1: a small file may be a slow one
    whole = json.loads(capsys.readouterr().out)
    here = [*sys.path[:1], str(KILLER.parent), str(KILLER.parent.parent)]
    # recovery is over at the first: the states are those of the integers
    places = ["before:recovered", "state:1", "state:3", "before:scales-"]
    child = subprocess.run(
        [sys.executable, KILLER, json.dumps([*LINE, "--out", "killed"]), *places],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(here)},
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert main([*LINE, "--out", "killed"]) in (0, 1)
    again = json.loads(capsys.readouterr().out)
    assert timeless(again["steps"]) == timeless(whole["steps"])
    assert timeless(again["recover"]) == timeless(whole["recover"])
    files = [tmp_path / run / "exports" / f"{run}.onnx" for run in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"learn": "ten"}, "length `ten`"),
        ({"learn": "5steps", "quantize": "none"}, "no integers to learn"),
        ({"recover": None, "augment": None, "learn_codes": True}, "learn_codes says how"),
        ({"recover": None, "learn": "5steps", "augment": None, "rate": 0.1}, "rate says how"),
        ({"recover": None, "learn": "none"}, "augment says how"),
        ({"recover": None, "learn": "5steps", "learn_from": "labels"}, "needs labels"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(
    tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(WrongUse, match=text):
        compress(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_outputs_that_are_no_logits_are_learned_from_as_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    x = torch.randn(200, 8)
    asked: dict[str, Any] = {"data": x, "quantize": "int8"}
    with pytest.raises(WrongUse, match="compares classes"):
        front.compress(
            module, x[:2], out=tmp_path / "a", learn="5steps", learn_from="logits", **asked
        )
    found = front.compress(module, x[:2], out=tmp_path / "a", learn="5steps", **asked)
    assert [row["learn_from"] for row in found.metrics["recover"]] == ["outputs:1"]
    assert found.metrics["recover"][0]["measure"] == "relative_error"
    found = front.compress(
        module, x[:2], out=tmp_path / "b", recover="2steps", learn_from="hidden", **asked
    )
    assert [row["step"] for row in found.metrics["steps"]][-1] == "exported"
    assert [row["learn_from"] for row in found.metrics["recover"]] == ["hidden:1", "outputs:1"]
