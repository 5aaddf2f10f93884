"""Recovery of networks by itself: with masks, in graphs, from any data, by any optimizer."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

pytest.importorskip("lightning", reason="learning needs lightning")

from lighten import front, front_recover
from lighten.coupling import couple
from lighten.errors import BadInput, ChangedRequest
from lighten.graph_norms import has_norms, learning_norms
from lighten.network import Network
from lighten.network_quality import outputs
from lighten.recover import Judge, recover
from lighten.samples import samples
from lighten.shrink import graph_module, own_module
from lighten.training_data import collected, training_data
from small_networks import images, labels, trained

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


# -- mistakes --------------------------------------------------------------------------------------
def test_small_batches_and_batch_norms_do_not_go_together(teacher: Network, small: Network) -> None:
    with pytest.raises(BadInput, match="a batch of 4 examples is too small"):
        recover(small, teacher, training_data(X, tested=True), length="2steps", batch=4, **CPU)
    with pytest.raises(BadInput, match="a batch of 5 examples is too small"):
        recover(small, teacher, training_data(X[:6], tested=True), length="2steps", **CPU)


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
