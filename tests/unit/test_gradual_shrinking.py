"""Channels that go during training: budgets, masked equals cut, group lasso, checkpoints."""

from __future__ import annotations

import copy
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lighten.coupling import Couplings, couple
from lighten.errors import ImpossibleBudget, UnknownName, WrongUse
from lighten.gradual_shrinking import GradualShrinking
from lighten.group_lasso import GroupLasso
from lighten.macs import macs
from lighten.masked import masked
from lighten.network import Network
from lighten.shrink import shrink
from small_networks import CLASSES, Plain, Residual, images, trained

KINDS = {"plain": Plain, "residual": Residual}
DATA = images(64)
LABELS = torch.arange(64) % CLASSES


@cache
def couplings_of(kind: str) -> Couplings:
    return couple(Network.of(trained(KINDS[kind]), DATA[:2], kind))


def fresh(kind: str = "residual") -> nn.Module:
    return trained(KINDS[kind]).train()


def train(module: nn.Module, optimizer: Any, steps: range, *parts: Any) -> None:
    for n in steps:
        pick = torch.randint(64, (16,), generator=torch.Generator().manual_seed(n))
        F.cross_entropy(module(DATA[pick]), LABELS[pick]).backward()
        optimizer.step()
        for part in parts:
            part.step(n, optimizer)
        optimizer.zero_grad()


def sgd(module: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)


def made(module: nn.Module, kind: str = "residual", **options: Any) -> GradualShrinking:
    options = {"start": 2, "end": 10, "every": 2, "couplings": couplings_of(kind), **options}
    return GradualShrinking(module, DATA[:2], options.pop("budget", "0.5 macs"), **options)


@torch.no_grad()
def out(module: nn.Module) -> Tensor:
    module = copy.deepcopy(module).eval()
    return module(DATA)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["cubic", "linear"])
def test_widths_follow_the_schedule_and_the_cut_equals_the_masked_network(
    kind: str, schedule: str
) -> None:
    module = fresh(kind)
    before = macs(Network.of(module, DATA[:2])).total
    shrinking, optimizer = made(module, kind, schedule=schedule), sgd(module)
    widths, seen = shrinking.widths, []
    for n in range(1, 13):
        train(module, optimizer, range(n, n + 1), shrinking)
        limit = before * (1 - shrinking.clock.schedule.at(n))
        assert shrinking.cost <= limit * (1 + 1e-9)
        assert all(width <= widths[name] for name, width in shrinking.widths.items())
        widths = shrinking.widths
        seen.append(shrinking.cost)
        # what is masked is what `masked` says, after a step of SGD with momentum too
        network = Network.of(module, DATA[:2])
        expected = masked(network, shrinking.couplings, shrinking.keep)
        for name, value in expected.module.state_dict().items():
            assert torch.equal(value, network.module.state_dict()[name]), name
    assert len(set(seen)) > 3  # not all at once
    found = shrinking.finish()
    assert isinstance(found.module, KINDS[kind])
    assert 0.35 * before <= found.cost == macs(found.network).total <= 0.5 * before
    torch.testing.assert_close(found.network(DATA), out(module), rtol=1e-4, atol=1e-5)
    assert found.network.parameters < sum(p.numel() for p in module.parameters())


def test_momentum_of_what_is_gone_is_zero() -> None:
    module = fresh()
    shrinking, optimizer = made(module), sgd(module)
    train(module, optimizer, range(1, 13), shrinking)
    for name, p in module.named_parameters():
        for dim, gone in shrinking.where.get(name, {}).items():
            momentum = optimizer.state[p]["momentum_buffer"]
            assert not momentum.index_select(dim, gone).any()
            assert momentum.any()


@pytest.mark.parametrize("criterion", ["group_obs", "taylor2", "batchnorm"])
def test_other_criteria(criterion: str) -> None:
    module = fresh()
    data = None if criterion == "batchnorm" else DATA[:16]
    shrinking, optimizer = made(module, criterion=criterion, data=data, every=4), sgd(module)
    train(module, optimizer, range(1, 11), shrinking)
    assert shrinking.finish().cost <= 0.5 * shrinking.whole


def test_a_resumed_training_goes_the_same_way(tmp_path: Path) -> None:
    module = fresh()
    shrinking, optimizer = made(module), sgd(module)
    train(module, optimizer, range(1, 7), shrinking)
    states = [part.state_dict() for part in (module, optimizer, shrinking)]
    torch.save(states, tmp_path / "state.pt")
    train(module, optimizer, range(7, 13), shrinking)
    again = fresh()
    again_shrinking, again_optimizer = made(again), sgd(again)
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    for part, state in zip((again, again_optimizer, again_shrinking), states, strict=True):
        part.load_state_dict(state)
    train(again, again_optimizer, range(7, 13), again_shrinking)
    assert again_shrinking.widths == shrinking.widths
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    with pytest.raises(WrongUse, match=r"budget='0\.5 macs'"):
        made(fresh(), budget="0.6 macs").load_state_dict(states[2])


def test_a_budget_of_parameters_and_multiples() -> None:
    module = fresh()
    shrinking = made(module, budget="0.5 params", multiple=4, end=2)
    shrinking(2, 2)
    found = shrinking.finish()
    assert found.cost <= 0.5 * shrinking.whole
    assert {width % 4 for width in shrinking.widths.values()} == {0}


def test_a_budget_that_is_met_already_changes_nothing() -> None:
    module = fresh()
    shrinking = made(module, budget="1 macs", end=2)
    before = out(module)
    shrinking.step(2)
    assert torch.equal(shrinking.finish().network(DATA), before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"end": 1}, "from step 2 to step 1"),
        ({"budget": "80MB"}, "MACs or parameters"),
        ({"multiple": 0}, "multiples of 0"),
        ({"criterion": "group_obs"}, "needs"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(WrongUse, match=said):
        made(fresh(), **options)


def test_other_mistakes_are_told() -> None:
    with pytest.raises(UnknownName, match="unknown criterion"):
        made(fresh(), criterion="l3")
    with pytest.raises(ImpossibleBudget, match=r"0\.001 macs"):
        made(fresh(), budget="0.001 macs")
    with pytest.raises(WrongUse, match="no channels that can go"):
        GradualShrinking(nn.Linear(4, 3), torch.zeros(2, 4), "0.5 macs", end=4)
    shrinking = made(fresh())
    shrinking.step(5)
    with pytest.raises(WrongUse, match="step 4 comes after step 5"):
        shrinking.step(4)
    with pytest.raises(WrongUse, match="stopped at step 5"):
        shrinking.finish()
    shrinking.step(10)
    shrinking.module.load_state_dict(fresh().state_dict())
    with pytest.raises(WrongUse, match="not zero where it is masked"):
        shrinking.finish()


# -- group lasso


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_is_its_formula(kind: str) -> None:
    module, couplings = fresh(kind), couplings_of(kind)
    lasso = GroupLasso(module, couplings, strength=0.5, contrast=0)
    own = dict(module.named_parameters())
    total = 0.0
    for axis in couplings.free:
        for unit in range(axis.width):
            parts = [
                own[m.parameter].index_select(m.dim, m.index[unit]).flatten()
                for m in axis.members
                if m.parameter in own
            ]
            group = torch.cat(parts)
            total += 0.5 * len(group) ** 0.5 * float(group.detach().norm())
    assert float(lasso().detach()) == pytest.approx(total, rel=1e-5)
    lasso().backward()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    assert grads
    assert all(bool(torch.isfinite(g).all()) for g in grads)


def test_the_gradient_at_zero_is_zero() -> None:
    module = fresh()
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    lasso = GroupLasso(module, couplings_of("residual"), strength=1.0)
    lasso().backward()
    assert all(not p.grad.any() for p in module.parameters() if p.grad is not None)


def test_the_proximal_step_minimises_what_it_should() -> None:
    """One axis, disjoint groups: argmin ½‖v - w‖² + rate λ √size ‖v‖ in closed form and by hand."""
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    couplings = couple(Network.of(module, torch.randn(2, 4)))
    lasso = GroupLasso(module, couplings, strength=0.3, contrast=0)

    def groups() -> Tensor:
        a, b = module[0], module[2]
        return torch.cat([a.weight, a.bias[:, None], b.weight.T], 1).detach().clone()

    w = groups()
    lasso.press(0.5)
    v, press = groups(), 0.5 * 0.3 * 8**0.5

    def objective(x: Tensor) -> Tensor:
        return 0.5 * (x - w).square().sum(1) + press * x.norm(dim=1)

    best = objective(v)
    for seed in range(50):
        nudge = 0.05 * torch.randn(w.shape, generator=torch.Generator().manual_seed(seed))
        assert (objective(v + nudge) >= best - 1e-6).all()
    assert (v.norm(dim=1) < w.norm(dim=1)).all()


def test_whole_groups_go_to_zero_and_then_are_cut() -> None:
    module, couplings = fresh(), couplings_of("residual")
    lasso, optimizer = GroupLasso(module, couplings, strength=0.01), sgd(module)
    train(module, optimizer, range(1, 81), lasso)
    keep = lasso.keep()
    gone = {name: 16 - len(kept) for name, kept in keep.items()}
    assert sum(gone.values()) >= 4
    small = shrink(Network.of(module, DATA[:2]), couplings, keep)
    torch.testing.assert_close(small(DATA), out(module), rtol=1e-4, atol=1e-5)
    assert macs(small).total < 0.9 * macs(Network.of(module, DATA[:2])).total


def test_only_what_is_to_go_is_pressed_and_more_and_more() -> None:
    module, couplings = fresh(), couplings_of("residual")
    axis = couplings.free[-1]
    keep = {axis.name: torch.arange(axis.width // 2)}
    lasso = GroupLasso(
        module, couplings, strength=0.0, growth=0.01, every=5, most=0.2, staying=keep
    )
    before = GroupLasso(module, couplings, strength=1.0).norms()
    weights = []
    for n in range(1, 121):
        lasso.step(n)
        weights.append(lasso.weight)
        lasso.press(0.02)
    assert weights[3:5] == [0.0, 0.01]
    assert max(weights) == 0.2
    assert lasso.keep()[axis.name].tolist() == keep[axis.name].tolist()
    after = GroupLasso(module, couplings, strength=1.0).norms()[axis.name]
    assert torch.equal(after[keep[axis.name]], before[axis.name][keep[axis.name]])
    assert lasso.norms().keys() == {axis.name}


def test_lasso_in_checkpoints_and_mistakes() -> None:
    module, couplings = fresh(), couplings_of("residual")
    lasso = GroupLasso(module, couplings, strength=1e-3, growth=1e-3)
    lasso.step(7)
    again = GroupLasso(module, couplings, strength=1e-3, growth=1e-3)
    again.load_state_dict(lasso.state_dict())
    assert again.weight == lasso.weight == pytest.approx(8e-3)
    with pytest.raises(WrongUse, match="step 6 comes after step 7"):
        again.step(6)
    with pytest.raises(WrongUse, match="strength=-1"):
        GroupLasso(module, couplings, strength=-1)
    with pytest.raises(WrongUse, match="every 0 steps"):
        GroupLasso(module, couplings, strength=1, every=0)
    with pytest.raises(WrongUse, match="those of another network"):
        GroupLasso(nn.Linear(3, 3), couplings, strength=1)
