"""Recovery as a stage of a run: its steps, resumed, zeros and integers, what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

pytest.importorskip("lightning", reason="learning needs lightning")

from lighten import cli, front, learn_state, progress, recover_stage
from lighten.errors import ChangedRequest, MissingPackage, WrongUse
from lighten.recover import Judge
from lighten.registry import exporters
from small_networks import SIDE, images, labels, trained

X = images(160)
Y = labels(trained(), X)


pytestmark = pytest.mark.usefixtures("one_thread")


def compress(out: Path, **options: Any) -> Any:
    asked = {"data": (X, Y), "budget": "0.5 macs", "recover": "3epochs", "export": "checkpoint"}
    module = trained()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 0.1
    with torch.no_grad():
        module.head.weight.mul_(10)  # so that there is something to lose
    return front.compress(module, X[:2], out=out, **(asked | options))


def test_a_run_prunes_recovers_and_says_what_each_step_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {
        "data": images(600), "test": X, "budget": "0.3 macs", "augment": "none",
        "recover": "15epochs", "samples": 64,
    }  # fmt: skip
    found = compress(tmp_path / "run", rate=0.02, **asked)
    steps = [row["step"] for row in found.metrics["steps"]]
    assert steps == ["original", "pruned", "recovered", "exported"]
    kld = {row["step"]: row["mean_kld"]["value"] for row in found.metrics["steps"][1:]}
    assert kld["recovered"] < kld["pruned"]
    assert kld["exported"] == pytest.approx(kld["recovered"], rel=1e-4)
    (learned,) = found.metrics["recover"]
    assert (learned["learn_from"], learned["rate"]) == ("logits:1", 0.02)
    assert learned["after"] < learned["before"]
    assert not list((tmp_path / "run" / "recover").rglob("step-*"))
    assert list((tmp_path / "run" / "recover").rglob("history.jsonl"))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was there already")

    monkeypatch.setattr(recover_stage, "recover", never)
    again = compress(tmp_path / "run", rate=0.02, **asked)
    state = found.module.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.module.state_dict().items())
    with pytest.raises(ChangedRequest, match="another request") as error:
        compress(tmp_path / "run", rate=0.1, **asked)
    assert "recover.rate: 0.02 -> 0.1" in error.value.hint


def test_a_run_that_is_stopped_while_it_recovers_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compress(tmp_path / "whole")
    save = learn_state.Checkpoints.save

    def stopped(self: Any, step: int, tensors: Any, facts: Any) -> None:
        save(self, step, tensors, facts)
        raise KeyboardInterrupt

    monkeypatch.setattr(learn_state.Checkpoints, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        compress(tmp_path / "run")
    monkeypatch.setattr(learn_state.Checkpoints, "save", save)
    assert list((tmp_path / "run" / "recover").rglob("step-*"))
    again = compress(tmp_path / "run")
    state = whole.module.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.module.state_dict().items())


def test_sparse_weights_recover_and_are_stored_with_their_zeros(tmp_path: Path) -> None:
    plain = compress(tmp_path / "plain", budget=None, sparsity="0.5", recover=None)
    found = compress(tmp_path / "run", budget=None, sparsity="0.5", recover="3epochs")
    assert found.metrics["after"]["bytes"] == plain.metrics["after"]["bytes"]
    weight = found.module.conv1.weight
    assert int((weight == 0).sum()) == weight.numel() // 2
    assert found.metrics["recover"][0]["taken"] in ("yes", "no")
    resumed = compress(tmp_path / "plain", budget=None, sparsity="0.5", recover=None)
    assert torch.equal(resumed.module.conv1.weight, plain.module.conv1.weight)


@pytest.mark.parametrize("codes", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sparse_integers_learn_and_keep_their_zeros(tmp_path: Path, codes: bool) -> None:
    how: dict[str, Any] = {"budget": None, "sparsity": "0.5", "quantize": "w4"}
    plain = compress(tmp_path / "plain", **how, recover=None)
    found = compress(
        tmp_path / "run", **how, recover="2epochs", learn="30steps", learn_codes=codes or None
    )
    whole = compress(tmp_path / "whole", budget=None, quantize="w4", recover=None)
    sizes = [run.metrics["after"]["bytes"] for run in (plain, found, whole)]
    assert sizes[0] == sizes[1] < sizes[2]
    assert [row["what"] for row in found.metrics["recover"]] == [
        "weights", "scales and codes" if codes else "scales"
    ]  # fmt: skip
    stored = exporters["checkpoint"].open(found.exported)  # type: ignore[attr-defined]
    sparse = {n: w for n, w in stored.weights.items() if w.spec.sparsity}
    assert sparse
    state = found.module.state_dict()
    for name, weight in sparse.items():
        gone = state[name].flatten(1) == 0
        assert int(gone.sum()) == round(gone.numel() / 2)
        assert not weight.dense()[gone].any()


def test_integers_come_after_recovery(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    found = compress(tmp_path / "run", export="onnx", quantize="int8", recover="2epochs")
    rows = {row["step"]: row for row in found.metrics["steps"]}
    assert rows["exported"]["mean_kld"] != rows["recovered"]["mean_kld"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"]


def test_a_recovery_that_measures_worse_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = recover_stage.recover

    def spoiled(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        with torch.no_grad():
            found.network.module.head.bias.add_(torch.arange(5.0) * 9)
        return found

    plain = compress(tmp_path / "plain", recover=None, data=X)
    monkeypatch.setattr(recover_stage, "recover", spoiled)
    found = compress(tmp_path / "run", data=X)
    assert found.metrics["recover"][0]["taken"] == "no"
    kld = {row["step"]: row["mean_kld"]["value"] for row in found.metrics["steps"][1:]}
    assert kld["recovered"] > kld["pruned"] == pytest.approx(kld["exported"], rel=1e-4)
    state = plain.module.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in found.module.state_dict().items())


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text("from small_networks import Residual as factory\n")
    save_file(trained().state_dict(), tmp_path / "w.safetensors")
    pixels = (64 * images(150) + 128).clamp(0, 255).byte().permute(0, 2, 3, 1)
    np.savez(tmp_path / "data.npz", images=pixels.numpy(), labels=Y[:150].numpy())
    monkeypatch.chdir(tmp_path)
    line = (
        f"compress net.py:factory --weights w.safetensors --data data.npz --size {SIDE}"
        " --mean half --std half --budget 0.4macs --export checkpoint --out run"
        " --recover 2epochs --learn-from logits:1,labels:0.1 --rate 0.01 --augment flip --json"
    )
    assert cli.main(line.split()) in (0, 1)  # 1: a checkpoint of so small a network may be larger
    found = json.loads(capsys.readouterr().out)
    assert found["recover"][0]["learn_from"] == "logits:1,labels:0.1"
    assert [row["step"] for row in found["steps"]] == [
        "original", "pruned", "recovered", "exported"
    ]  # fmt: skip
    assert cli.main([*line.split()[:-1]]) in (0, 1)
    out = capsys.readouterr().out
    assert "recovered" in out
    assert "taken" in out
    progress.be_quiet(False)


def test_a_run_stops_where_patience_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "__call__", lambda *_: -1.0)  # nothing ever gets better
    found = compress(tmp_path / "run", recover="10epochs", patience=2)
    (learned,) = found.metrics["recover"]
    assert learned["steps"] == 3  # of one epoch each: the first is the best so far
    with pytest.raises(ChangedRequest, match="another request"):
        compress(tmp_path / "run", recover="10epochs", patience=3)


def test_a_run_takes_the_optimizer_that_it_is_given(tmp_path: Path) -> None:
    found = compress(
        tmp_path / "run", optimizer="muon", augment="crop+flip+cutmix", recover="2epochs"
    )
    (learned,) = found.metrics["recover"]
    assert (learned["optimizer"], learned["rate"]) == ("muon", 3e-3)
    assert (learned["augment"], learned["mirrored"]) == ("crop+flip+cutmix", True)


# -- mistakes --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"recover": "ten"}, "length `ten`"),
        ({"learn_from": "logit"}, "unknown loss `logit`"),
        ({"learn_from": "labels", "data": X}, "needs labels, the data has none"),
        ({"augment": "turn"}, "augment is `turn`"),
        ({"augment": "none", "mirrored": True}, "mirrors no image"),
        ({"optimizer": "lion"}, "optimizer `lion` is not known"),
        ({"recover": None, "optimizer": "muon"}, "optimizer says how to recover"),
        ({"rate": -1.0}, "a rate of -1"),
        ({"patience": 0}, "a patience of 0"),
        ({"recover": None, "patience": 2}, "patience says how to recover"),
        ({"recover": None, "rate": 0.1}, "rate says how to recover"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(
    tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(WrongUse, match=text):
        compress(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_the_missing_package_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lightning.fabric", None)
    with pytest.raises(MissingPackage, match="lightning"):
        compress(tmp_path / "run")
    assert not (tmp_path / "run").exists()
