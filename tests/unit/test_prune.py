"""Structural pruning alone: budgets, every criterion, compensation, what is saved."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lighten
from lighten import errors
from lighten.macs import macs
from lighten.masked import masked
from lighten.network import Network
from lighten.prune import GROUP_OBS, Pruned, prune_network
from lighten.registry import criteria
from small_networks import CLASSES, Plain, Residual, images, trained

KINDS = {"plain": Plain, "residual": Residual}
DATA = images(64)


@cache
def network_of(kind: str) -> Network:
    """Never changed, and so traced once."""
    return Network.of(trained(KINDS[kind]), DATA[:2], kind)


def off(found: Pruned, whole: Network) -> float:
    """Mean squared error of the outputs on what it was calibrated on."""
    return float((found.network(DATA) - whole(DATA)).square().mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion", [GROUP_OBS, *sorted(criteria)])
def test_every_criterion_meets_the_budget(kind: str, criterion: str) -> None:
    network = network_of(kind)
    found = prune_network(
        network, DATA, budget="0.5 macs", criterion=criterion, compensate=False, batch_norms=False
    )
    before, now = macs(network).total, macs(Network.of(found.module, DATA[:2])).total
    assert 0.35 * before <= now == found.cost <= 0.5 * before
    assert found.keep
    assert isinstance(found.module, KINDS[kind])
    expected = masked(network, found.couplings, found.keep)
    torch.testing.assert_close(found.network(DATA), expected(DATA), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion", [GROUP_OBS, "l1"])
def test_compensation_mends_most_of_the_output(kind: str, criterion: str) -> None:
    network = network_of(kind)
    plain, mended = (
        prune_network(network, DATA, budget="0.5 macs", criterion=criterion, compensate=on)
        for on in (False, True)
    )
    assert _lists(mended.keep) == _lists(plain.keep)
    assert mended.cost == plain.cost
    assert off(mended, network) < 0.5 * off(plain, network)


def _lists(keep: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: kept.tolist() for name, kept in keep.items()}


def test_group_obs_loses_less_than_a_plain_criterion() -> None:
    network = network_of("residual")
    ours = prune_network(network, DATA, budget="0.5 macs")
    plain = prune_network(network, DATA, budget="0.5 macs", criterion="l1", compensate=False)
    assert off(ours, network) < 0.5 * off(plain, network)


def test_parameters_and_absolute_amounts() -> None:
    network = network_of("residual")
    found = prune_network(network, DATA, budget="0.4 params")
    assert found.network.parameters == found.cost <= 0.4 * network.parameters
    room = macs(network).total // 3
    found = prune_network(network, DATA, budget=f"{room / 1000}k macs")
    assert macs(found.network).total <= room


def test_a_budget_that_is_met_already_changes_nothing() -> None:
    network = network_of("residual")
    found = prune_network(network, DATA, budget="1 macs")
    assert not found.keep
    assert found.cost == macs(network).total
    assert torch.equal(found.network(DATA), network(DATA))


@pytest.mark.parametrize("kind", KINDS)
def test_several_steps_keep_units_of_the_original(kind: str) -> None:
    network = network_of(kind)
    found = prune_network(network, DATA, budget="0.4 macs", steps=2)
    assert found.cost <= 0.4 * macs(network).total
    widths = {a.name: a.width for a in found.couplings.axes}
    for name, kept in found.keep.items():
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert set(kept.tolist()) <= set(range(widths[name]))
    found.couplings.check(found.keep)
    plain = prune_network(
        network, DATA, budget="0.4 macs", steps=2, compensate=False, batch_norms=False
    )
    expected = masked(network, plain.couplings, plain.keep)
    torch.testing.assert_close(plain.network(DATA), expected(DATA), rtol=1e-4, atol=1e-5)
    assert off(found, network) < off(plain, network)


def test_the_same_share_of_every_axis() -> None:
    network = network_of("residual")
    found = prune_network(network, DATA, budget="0.5 macs", per_axis=True)
    widths = {len(kept) for kept in found.keep.values()}
    assert len(found.keep) == 2
    assert len(widths) == 1


def test_widths_are_multiples() -> None:
    network = network_of("residual")
    found = prune_network(network, DATA, budget="0.5 macs", multiple=4)
    assert found.keep
    assert all(len(kept) % 4 == 0 for kept in found.keep.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2])
def test_saved_and_loaded(kind: str, steps: int, tmp_path: Path) -> None:
    module = trained(KINDS[kind])
    found = lighten.prune(module, DATA[:2], budget="0.5 macs", data=DATA, steps=steps)
    found.save(tmp_path / "small")
    again = lighten.load(KINDS[kind], tmp_path / "small")
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(DATA), found.network(DATA))


def test_the_users_module_is_not_touched() -> None:
    module = trained().train()
    before = copy.deepcopy(module.state_dict())
    found = lighten.prune(module, DATA[:2], budget="0.5 macs", data=DATA)
    assert found.module is not module
    assert module.training
    assert all(p.requires_grad for p in module.parameters())
    assert all(torch.equal(t, before[k]) for k, t in module.state_dict().items())


def test_no_data_is_needed_for_sizes_of_weights() -> None:
    network = network_of("plain")
    found = prune_network(network, None, budget="0.5 macs", criterion="l2", compensate=False)
    assert found.cost <= 0.5 * macs(network).total


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"budget": "20kB"}, errors.WrongUse, "bytes"),
        ({"budget": "12ms"}, errors.WrongUse, "ms"),
        ({"budget": "3 apples"}, errors.WrongUse, "apples"),
        ({"budget": "0.5 macs", "criterion": "tailor1"}, errors.UnknownName, "taylor1"),
        ({"budget": "0.5 macs", "criterion": "group_obbs"}, errors.UnknownName, "group_obs"),
        ({"budget": "0.5 macs", "steps": 0}, errors.WrongUse, "steps=0"),
        ({"budget": "0.5 macs", "multiple": 0}, errors.WrongUse, "multiple=0"),
        (
            {"budget": "0.001 macs"},
            errors.ImpossibleBudget,
            "in macs: 136.3 cannot be met: the least that",
        ),
    ],
)
def test_mistakes_are_told(options: dict[str, object], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind) as caught:
        prune_network(network_of("plain"), DATA, **options)  # type: ignore[arg-type]
    assert said in str(caught.value)
    assert caught.value.hint  # type: ignore[attr-defined]


@pytest.mark.parametrize("criterion", [GROUP_OBS, "l2", "taylor1"])
@pytest.mark.parametrize("compensate", [True, False])
def test_what_needs_data_says_so(criterion: str, compensate: bool) -> None:
    if criterion == "l2" and not compensate:
        return
    with pytest.raises(errors.WrongUse, match="needs"):
        prune_network(
            network_of("plain"), None, budget="0.5 macs", criterion=criterion,
            compensate=compensate,
        )  # fmt: skip


def test_a_network_with_nothing_to_remove() -> None:
    network = Network.of(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), DATA[:2])
    with pytest.raises(errors.ImpossibleBudget):
        prune_network(network, DATA, budget="0.5 macs")


def test_masked_and_pruned_differ_only_in_size() -> None:
    """Attention: heads go whole, and what it costs besides weights is counted."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.head = nn.Linear(16, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    x = torch.randn(48, 6, 16)
    network = Network.of(Attention(), x[:2])
    found = prune_network(network, x, budget="0.7 macs", compensate=False)
    assert macs(found.network).total == found.cost <= 0.7 * macs(network).total
    expected = masked(network, found.couplings, found.keep)
    torch.testing.assert_close(found.network(x), expected(x), rtol=1e-4, atol=1e-5)
