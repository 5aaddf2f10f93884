"""Units of axes: their scores, the choice among them, gradients and scales of a network."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lighten.coupling import couple
from lighten.errors import BadInput, WrongUse
from lighten.gradients import gradients, with_gradients
from lighten.importance import all_scores, axis_scores, choose, scales, shares
from lighten.network import Network
from lighten.registry import criteria
from lighten.shrink import shrink
from lighten.types import Axis, Member, Stats


class Small(nn.Module):
    """Two convolutions, a batch norm between, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4, 5)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([3.0, -0.5, 1.0, 2.0, 0.1, -4.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x: Tensor = self.head(self.second(x).relu().mean((2, 3)))
        return x


def network() -> Network:
    return Network.of(Small(), torch.zeros(2, 3, 8, 8))


def axis(width: int = 6) -> Axis:
    index = torch.arange(6).view(width, -1)
    return Axis("first.weight", width, "channels", (
        Member("first.weight", 0, index, "writes"),
        Member("norm.weight", 0, index, "carries"),
        Member("second.weight", 1, index, "reads"),
    ))  # fmt: skip


def test_a_unit_is_worth_the_sum_of_its_slices() -> None:
    net = network()
    state = net.module.state_dict()
    channel = state["first.weight"].abs().sum((1, 2, 3)) + state["second.weight"].abs().sum(
        (0, 2, 3)
    )
    assert torch.allclose(axis_scores(net, axis(), "l1").float(), channel)
    pairs = axis_scores(net, axis(3), "l1")
    assert torch.allclose(pairs.float(), channel.view(3, 2).sum(1))


def test_a_criterion_of_outputs_sees_only_what_writes() -> None:
    net = network()
    found = axis_scores(net, axis(), "batchnorm", scales(net))
    assert torch.allclose(found.float(), torch.tensor([3.0, 0.5, 1.0, 2.0, 0.1, 4.0]))
    assert "second.weight" not in scales(net)


def test_a_criterion_of_ones_own_is_a_function() -> None:
    def ones(weight: Tensor, stats: Stats | None) -> Tensor:
        return torch.ones_like(weight)

    assert axis_scores(network(), axis(), ones).tolist() == [3 * 9 + 4 * 9.0] * 6


@pytest.mark.parametrize("name", [n for n in criteria if n not in ("l1", "l2", "fpgm")])
def test_missing_statistics_are_refused(name: str) -> None:
    with pytest.raises(WrongUse, match=name):
        axis_scores(network(), axis(), name)


def test_scored_chosen_and_shrunk() -> None:
    net = network()
    couplings = couple(net)
    free = [a for a in couplings.axes if a.locked is None]
    kept = choose(all_scores(net, free, "l2"), 0.5)
    assert sum(len(k) for k in kept.values()) == 5
    small = shrink(net, couplings, kept)
    assert small.parameters < net.parameters


widths = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@given(widths, st.floats(0, 0.99), st.integers(1, 9), st.booleans(), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_choices_are_sorted_multiples_of_the_highest(
    sizes: list[int], share: float, multiple: int, per_axis: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = {f"a{i}": torch.rand(n, generator=g) for i, n in enumerate(sizes)}
    kept = choose(scores, share, per_axis, multiple)
    gone = sum(sizes) - sum(len(k) for k in kept.values())
    for name, k in kept.items():
        n, score = len(scores[name]), scores[name]
        assert k.tolist() == sorted(set(k.tolist()))
        assert len(k) >= min(n, multiple)
        assert len(k) % multiple == 0 or len(k) == n
        lost = torch.ones(n, dtype=torch.bool)
        lost[k] = False
        if lost.any():
            assert score[lost].max() <= score[k].min()
    if not per_axis:
        assert gone <= round(share * sum(sizes))
        if multiple == 1:
            most = sum(sizes) - len(sizes)
            assert gone == min(round(share * sum(sizes)), most)


def test_axes_compete_relative_to_their_mean_or_as_they_are() -> None:
    scores = {"large": torch.tensor([10.0, 90.0]), "small": torch.tensor([0.9, 1.1])}
    assert len(choose(scores, 0.25)["large"]) == 1
    assert len(choose(scores, 0.25, relative=False)["small"]) == 1


def test_steps_remove_the_share_in_all() -> None:
    left = 1.0
    for part in shares(0.6, 4):
        left *= 1 - part
    assert left == pytest.approx(0.4)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(WrongUse, match="cannot be removed"):
        choose({"a": torch.ones(3)}, share)


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(BadInput, match="`a`"):
        choose({"a": torch.tensor([1.0, float("nan")])}, 0.5)


# -- gradients -------------------------------------------------------------------------------------
def linear() -> Network:
    torch.manual_seed(2)
    return Network.of(nn.Linear(7, 3, bias=False), torch.zeros(1, 7))


def test_gradients_of_given_labels_are_those_of_the_cross_entropy() -> None:
    net = linear()
    x = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 3
    found = gradients(net, [(x[:12], labels[:12]), (x[12:], labels[12:])])["weight"]
    weight = net.module.state_dict()["weight"]
    missed = (x @ weight.T).softmax(-1) - nn.functional.one_hot(labels, 3)
    each = missed[:, :, None] * x[:, None, :]
    assert torch.allclose(found.mean, each.mean(0), atol=1e-6)
    assert torch.allclose(found.square, each.square().mean(0), atol=1e-6)
    assert found.n == 20


def test_drawn_labels_give_the_fisher_matrix() -> None:
    net = linear()
    x = torch.randn(3000, 7, generator=torch.Generator().manual_seed(0))
    found = gradients(net, x)["weight"]
    p = (x @ net.module.state_dict()["weight"].T).softmax(-1)
    fisher = ((p * (1 - p))[:, :, None] * x[:, None, :].square()).mean(0)
    assert torch.allclose(found.square, fisher, rtol=0.15)
    again = gradients(net, x[:50], seed=1)["weight"]
    assert torch.equal(again.square, gradients(net, x[:50], seed=1)["weight"].square)
    assert not torch.equal(again.square, gradients(net, x[:50], seed=2)["weight"].square)


def test_a_loss_of_ones_own() -> None:
    net = linear()
    x = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    found = gradients(net, x, loss=lambda out, label: out.sum())["weight"]
    assert torch.allclose(found.mean, x.mean(0).expand(3, -1), atol=1e-6)


def test_the_network_is_left_as_it_was() -> None:
    net = network()
    digest = net.digest
    found = gradients(net, torch.randn(4, 3, 8, 8))
    assert net.digest == digest
    assert not any(p.requires_grad or p.grad is not None for p in net.module.parameters())
    seen = with_gradients({}, found)
    assert set(seen) == {"first.weight", "second.weight", "head.weight"}
    assert axis_scores(net, axis(), "taylor2", seen).shape == (6,)
    assert axis_scores(net, axis(), "taylor1", seen).sum() > 0


def test_what_gradients_cannot_be_taken_of_is_refused() -> None:
    with pytest.raises(BadInput, match="no sample"):
        gradients(linear(), torch.zeros(0, 7))
    with pytest.raises(BadInput, match="finite"):
        gradients(linear(), torch.zeros(1, 7), loss=lambda out, label: out.sum() * float("nan"))
    with pytest.raises(WrongUse, match="not logits"):
        gradients(Network.of(nn.Flatten(0), torch.zeros(1, 7)), torch.zeros(1, 7))
