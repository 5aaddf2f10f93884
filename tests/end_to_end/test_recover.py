"""Recovery of networks: alone, in a run, resumed, with masks, in graphs, and what it refuses."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

pytest.importorskip("lightning", reason="learning needs lightning")

from lighten import cli, front, front_recover, learn_state, progress, recover_stage
from lighten.coupling import couple
from lighten.errors import BadInput, ChangedRequest, MissingPackage, WrongUse
from lighten.graph_norms import has_norms, learning_norms
from lighten.network import Network
from lighten.network_quality import outputs
from lighten.recover import Judge, recover
from lighten.registry import exporters
from lighten.samples import samples
from lighten.shrink import graph_module, own_module
from lighten.training_data import collected, training_data
from small_networks import SIDE, images, labels, trained

X = images(160)
Y = labels(trained(), X)
CPU: dict[str, Any] = {"accelerator": "cpu", "precision": "32-true"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher() -> Network:
    module = trained()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 0.1
    return Network.of(module, X[:2])


@pytest.fixture(scope="module")
def small(teacher: Network) -> Network:
    """Half of every axis, the first units, not compensated."""
    couplings = couple(teacher)
    return own_module(
        teacher, couplings, {a.name: torch.arange(a.width // 2) for a in couplings.free}
    )


# -- alone -----------------------------------------------------------------------------------------
def test_a_pruned_network_comes_nearer_to_what_it_was(teacher: Network, small: Network) -> None:
    before = {k: v.clone() for k, v in small.module.state_dict().items()}
    found = recover(
        small, teacher, training_data(X, tested=True), length="8epochs", batch=24, **CPU
    )
    m = found.metrics
    assert m["measure"] == "mean_kld"
    assert m["after"] < 0.5 * m["before"]
    assert m["examples"] + m["held_out"] == len(X)
    state = small.module.state_dict()
    assert all(torch.equal(state[k], v) for k, v in before.items())  # not changed
    module = found.network.module
    assert type(module) is type(small.module)
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    assert not torch.equal(module.bn.running_mean, small.module.bn.running_mean)


def test_a_graph_learns_as_the_module_that_it_came_from(teacher: Network) -> None:
    couplings = couple(teacher)
    keep = {a.name: torch.arange(a.width // 2) for a in couplings.free}
    data = training_data(X, tested=True, augment="none")
    found = [
        recover(
            build(teacher, couplings, keep), teacher, data, length="10steps", batch=24, **CPU
        ).metrics["after"]
        for build in (own_module, graph_module)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_norms_of_a_graph_are_what_they_were_once_it_has_learned(teacher: Network) -> None:
    graph = graph_module(teacher, couple(teacher), {})
    targets = [node.target for node in graph.module.graph.nodes]  # type: ignore[union-attr]
    plain = outputs(graph, X[:8])
    assert has_norms(graph.module)
    with learning_norms(graph.module):
        assert torch.equal(outputs(graph, X[:8]), plain)  # not in training mode
        graph.module.training = True
        graph.module(X[:8])
        graph.module.training = False
    assert [node.target for node in graph.module.graph.nodes] == targets  # type: ignore[union-attr]
    assert not torch.equal(outputs(graph, X[:8]), plain)  # statistics of the batch were taken in


def test_masked_weights_stay_zero(teacher: Network) -> None:
    module = copy.deepcopy(teacher.module)
    mask = torch.rand(module.conv1.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.7
    with torch.no_grad():
        module.conv1.weight.mul_(mask)
    found = recover(
        teacher.with_module(module), teacher, training_data(X, tested=True), length="3epochs",
        batch=24, masks={"conv1.weight": mask}, average=0.9, **CPU,
    )  # fmt: skip
    weight = found.network.module.conv1.weight
    assert found.metrics["best_step"] > 0
    assert not weight[~mask].any()
    assert not torch.equal(weight, module.conv1.weight)


def test_a_weight_of_two_factors_learns_as_any(teacher: Network) -> None:
    module = copy.deepcopy(teacher.module)
    weight = module.conv2.weight
    u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    first, second = nn.Conv2d(16, 3, 3, padding=1, bias=False), nn.Conv2d(3, 16, 1, bias=False)
    with torch.no_grad():
        first.weight.copy_(v[:3].view_as(first.weight))
        second.weight.copy_((u[:, :3] * s[:3])[..., None, None])
    module.conv2 = nn.Sequential(first, second)
    found = recover(
        teacher.with_module(module), teacher, training_data(X, tested=True), length="8epochs",
        batch=24, **CPU,
    )  # fmt: skip
    assert found.metrics["after"] < 0.7 * found.metrics["before"]
    assert [type(part) for part in found.network.module.conv2] == [nn.Conv2d, nn.Conv2d]
    assert found.network.module.conv2[0].weight.shape == (3, 16, 3, 3)


def test_with_labels_the_best_state_is_the_most_accurate(teacher: Network, small: Network) -> None:
    data = training_data((X, Y), tested=True, augment="none")
    found = recover(
        small, teacher, data, length="4epochs", learn_from="logits:1,labels:0.5", batch=24, **CPU
    )
    assert found.metrics["measure"] == "accuracy"
    right = (outputs(found.network, data.held_out).argmax(1) == data.labels).double().mean()
    assert found.metrics["after"] == pytest.approx(float(right))


def test_samples_are_learned_from_where_there_is_nothing_else(
    teacher: Network, small: Network
) -> None:
    found = recover(small, teacher, samples(X, calibration=64), length="2steps", batch=16, **CPU)
    assert found.metrics["examples"] + found.metrics["held_out"] == 64


def test_regressions_are_compared_by_their_error() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(64, 4)
    network = Network.of(module, x[:2])
    worse = copy.deepcopy(network.module)
    with torch.no_grad():
        worse[0].weight.add_(0.3)
    found = recover(
        network.with_module(worse), network, training_data(x, tested=True), length="5epochs",
        learn_from="hidden", rate=0.05, batch=16, **CPU,
    )  # fmt: skip
    assert found.metrics["measure"] == "relative_error"


def test_a_module_recovers_from_a_loader(teacher: Network) -> None:
    pruned = front.prune(teacher.module, X[:2], budget="0.4 macs", data=X, compensate=False)
    y = teacher(X).argmax(1)
    loader = DataLoader(TensorDataset(X, y), 32)
    found = front_recover.recover(
        pruned, teacher.module, X[:2], data=loader, length="8epochs", batch=32, accelerator="cpu"
    )
    assert found.metrics["after"] >= found.metrics["before"]
    assert found.metrics["measure"] == "accuracy"
    assert found.metrics["best_step"] > 0


# -- data ------------------------------------------------------------------------------------------
def test_what_is_measured_on_is_never_learned_from() -> None:
    x = torch.arange(5000.0)[:, None]
    for seed in (0, 3):
        held = samples(x, calibration=1000, seed=seed)
        data = training_data(x, calibration=1000, seed=seed)
        learned = set(data.course.rows.tolist())
        chosen_by = set(data.held_out.flatten().int().tolist())
        measured = set(held.held_out.flatten().int().tolist())
        assert not learned & measured
        assert not chosen_by & (measured | learned)
        assert len(learned) + len(chosen_by) + len(measured) == 5000
        assert not chosen_by & set(held.calibration.flatten().int().tolist())


def test_with_other_data_to_measure_on_all_is_learned_from() -> None:
    data = training_data(torch.zeros(100, 3), tested=True)
    assert (data.course.count, len(data.held_out)) == (90, 10)


def test_other_data_to_choose_by_leaves_all_to_learn_from() -> None:
    data = training_data(
        (X, Y), tested=True, held_out=DataLoader(TensorDataset(X[:20] + 1, Y[:20]), 8)
    )
    assert data.course.count == len(X)
    assert torch.equal(data.held_out, X[:20] + 1)
    assert data.labels is not None
    assert torch.equal(data.labels, Y[:20])


def test_a_loader_is_read_once_and_images_are_augmented_unless_told() -> None:
    loader = DataLoader(TensorDataset(X, Y), 32, shuffle=True)
    found = collected(loader)
    assert found[0].shape == X.shape
    assert sorted(found[1].tolist()) == sorted(Y.tolist())
    assert training_data(found).course.augment == "crop+flip"
    assert training_data(torch.zeros(40, 7)).course.augment == "none"


def test_the_last_states_of_a_noisy_judge_count_as_well(teacher: Network, small: Network) -> None:
    """With labels a state is judged by few examples, and those are told apart no finer."""
    data = training_data((X, Y), tested=True)
    judge = Judge(teacher, data)
    assert judge.measure == "accuracy"
    assert judge.margin(0.75) == pytest.approx(2 * (0.75 * 0.25 / len(data.held_out)) ** 0.5)
    assert Judge(teacher, training_data(X, tested=True)).margin(-0.1) == 0.0


def test_a_folder_is_of_one_teacher_and_one_set_of_data(
    tmp_path: Path, teacher: Network, small: Network
) -> None:
    def again(master: Network, data: Any, held_out: Any) -> Any:
        return recover(
            small, master, training_data(data, held_out=held_out, augment="none"), length="2steps",
            batch=16, folder=tmp_path, **CPU,
        ).metrics  # fmt: skip

    x, held = X[:100], X[100:]
    first = again(teacher, (x, Y[:100]), held)
    assert again(teacher, (x.clone(), Y[:100]), held)["after"] == first["after"]
    other = teacher.with_module(copy.deepcopy(teacher.module))
    with torch.no_grad():
        other.module.head.weight.mul_(2)
    for changed in (
        (other, (x, Y[:100]), held), (teacher, (x + 1, Y[:100]), held),
        (teacher, (x, 1 - Y[:100].clamp(max=1)), held), (teacher, (x, Y[:100]), held + 1),
    ):  # fmt: skip
        with pytest.raises(ChangedRequest, match="another training"):
            again(*changed)


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


# -- in a run --------------------------------------------------------------------------------------
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


# -- mistakes --------------------------------------------------------------------------------------
def test_small_batches_and_batch_norms_do_not_go_together(teacher: Network, small: Network) -> None:
    with pytest.raises(BadInput, match="a batch of 4 examples is too small"):
        recover(small, teacher, training_data(X, tested=True), length="2steps", batch=4, **CPU)
    with pytest.raises(BadInput, match="a batch of 5 examples is too small"):
        recover(small, teacher, training_data(X[:6], tested=True), length="2steps", **CPU)


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


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.05), ("adamw", 1e-3), ("muon", 3e-3)])
def test_every_optimizer_recovers_at_its_usual_rate(
    teacher: Network, small: Network, optimizer: str, rate: float
) -> None:
    data = training_data(X, tested=True)
    found = recover(
        small, teacher, data, length="30steps", batch=24, optimizer=optimizer, **CPU
    ).metrics
    assert (found["optimizer"], found["rate"]) == (optimizer, rate)
    assert found["after"] < 0.9 * found["before"]
