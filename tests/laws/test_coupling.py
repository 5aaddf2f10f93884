"""Every coupling: what is removed equals what is zeroed, for every pattern and every axis."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lighten.compare_outputs import distance
from lighten.coupling import Couplings, couple
from lighten.network import Network
from lighten.shrink import TOLERANCE, masked, shrink
from patterns import PATTERNS

parametrize = pytest.mark.parametrize("name", sorted(PATTERNS))
_made: dict[str, tuple[Network, Couplings]] = {}


def coupled(name: str) -> tuple[Network, Couplings]:
    if name not in _made:
        network = Network.of(*PATTERNS[name].make())
        _made[name] = network, couple(network)
    return _made[name]


def some(couplings: Couplings, seed: int, *names: str) -> dict[str, Tensor]:
    """For every axis, or those named, a random set of units: at least one kept, one removed."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for axis in couplings.free:
        if names and axis.name not in names:
            continue
        count = int(torch.randint(1, axis.width, (), generator=generator))
        keep[axis.name] = torch.randperm(axis.width, generator=generator)[:count].sort().values
    return keep


def other_inputs(network: Network, batch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    found = []
    for x in network.inputs:
        rest = x[:1].expand(batch, *x.shape[1:])
        noise = torch.randn(rest.shape, generator=generator)
        found.append(rest + noise if x.is_floating_point() else (rest + 3) % 11)
    return tuple(found)


def check_equal(
    small: Network, network: Network, couplings: Couplings, keep: dict[str, Tensor]
) -> None:
    reference = masked(network, couplings, keep)
    for batch in (2, 3):
        inputs = other_inputs(network, batch)
        assert distance(small(*inputs), reference(*inputs)) < TOLERANCE


@parametrize
def test_what_can_shrink_is_found(name: str) -> None:
    _, couplings = coupled(name)
    assert {axis.name: axis.width for axis in couplings.free} == PATTERNS[name].free
    assert all(axis.locked for axis in couplings.axes if axis not in couplings.free)


@parametrize
@pytest.mark.parametrize("seed", [0, 1])
def test_removed_equals_masked(name: str, seed: int) -> None:
    network, couplings = coupled(name)
    keep = some(couplings, seed)
    small = shrink(network, couplings, keep)
    check_equal(small, network, couplings, keep)
    assert small.parameters < network.parameters
    if PATTERNS[name].own is False:
        assert any("graph" in note for note in small.notes)
    elif PATTERNS[name].own:
        assert type(small.module) is type(network.module)
        assert not small.notes


@parametrize
def test_every_axis_alone(name: str) -> None:
    network, couplings = coupled(name)
    for axis in couplings.free:
        keep = some(couplings, 2, axis.name)
        check_equal(shrink(network, couplings, keep), network, couplings, keep)


@parametrize
def test_masking_changes_the_network(name: str) -> None:
    """Else the laws above would hold of an axis that is in truth not read."""
    network, couplings = coupled(name)
    for axis in couplings.free:
        keep = some(couplings, 3, axis.name)
        inputs = other_inputs(network, 2)
        reference = masked(network, couplings, keep)
        assert distance(reference(*inputs), network(*inputs)) > TOLERANCE


@parametrize
def test_the_shapes_of_a_shrunk_network_are_what_kept_says(name: str) -> None:
    network, couplings = coupled(name)
    keep = some(couplings, 4)
    small = dict(shrink(network, couplings, keep).module.named_parameters())
    for parameter, whole in network.module.named_parameters():
        if parameter not in small:
            continue  # read by nothing
        kept = couplings.kept(parameter, keep)
        assert small[parameter].shape == torch.Size([len(k) for k in kept])
        for dim, positions in enumerate(kept):
            whole = whole.index_select(dim, positions)
        assert torch.equal(small[parameter], whole)


@parametrize
def test_an_axis_covers_each_of_its_positions_once(name: str) -> None:
    _, couplings = coupled(name)
    seen: set[tuple[str, int, int]] = set()
    for axis in couplings.axes:
        for member in axis.members:
            assert len(member.index) == axis.width
            places = {(member.parameter, member.dim, i) for i in member.index.flatten().tolist()}
            assert len(places) == member.index.numel()
            assert not places & seen
            seen |= places


@parametrize
def test_a_shrunk_network_can_be_coupled_and_shrunk_again(name: str) -> None:
    network, couplings = coupled(name)
    keep = {n: torch.arange(max(len(k), 2)) for n, k in some(couplings, 5).items()}
    once = shrink(network, couplings, keep)
    again = couple(once)
    assert all(a.width <= PATTERNS[name].free.get(a.name, a.width) for a in again.free)
    more = some(again, 6)
    if more:
        check_equal(shrink(once, again, more), once, again, more)
