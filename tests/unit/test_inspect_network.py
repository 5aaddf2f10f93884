"""What can shrink and what it saves, against a network that really lost the unit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lighten.coupling import couple
from lighten.factories import open_network
from lighten.inspect_network import inspect_network
from lighten.macs import macs
from lighten.network import Network
from lighten.shrink import shrink
from lighten.summary import show


class Residual(nn.Module):
    """A stream of 6 channels that its own blocks read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.one = nn.Conv2d(6, 10, 3, padding=1)
        self.two = nn.Conv2d(10, 6, 1)
        self.mix = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.two(F.relu(self.one(x)))
        x = x + self.mix(x)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 5)
        self.two = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.sort(self.one(x), 1)[0])


@pytest.fixture(scope="module")
def residual() -> Network:
    torch.manual_seed(0)
    return Network.of(Residual(), torch.randn(2, 3, 8, 8))


def test_what_a_unit_saves_is_what_the_network_loses(residual: Network) -> None:
    couplings = couple(residual)
    rows = {row["axis"]: row for row in inspect_network(residual)["axes"]}
    assert len(couplings.free) == 2
    for axis in couplings.free:
        small = shrink(residual, couplings, {axis.name: torch.arange(1, axis.width)})
        row = rows[axis.name]
        assert row["units"] == axis.width
        assert row["locked"] == ""
        assert row["parameters_per_unit"] == residual.parameters - small.parameters
        assert row["macs_per_unit"] == macs(residual).total - macs(small).total


def test_the_smallest_network_is_what_it_says(residual: Network) -> None:
    couplings, facts = couple(residual), inspect_network(residual)
    small = shrink(residual, couplings, {a.name: torch.tensor([0]) for a in couplings.free})
    assert facts["smallest_parameters"] == small.parameters
    assert facts["smallest_macs"] == macs(small).total
    assert facts["axes_that_can_shrink"] == 2


def test_every_row_says_what_it_ties_and_why_it_stays(residual: Network) -> None:
    facts = inspect_network(residual)
    rows = {row["axis"]: row for row in facts["axes"]}
    stream = rows["stem.weight"]
    assert stream["ties"].startswith("3 writes, 3 reads, 7 carries: stem, two ...")
    assert stream["tied"]["mix.weight"] == "writes along 0, reads along 1"
    touched = 64 * (162 + 60 + 36) + 24 + 64 * 540  # every layer, `mix` once
    assert stream["macs_share"] == pytest.approx(touched / facts["macs"])
    assert stream["macs_per_unit"] == 64 * (27 + 10 + 11 + 90) + 4
    locked = [row for row in facts["axes"] if row["locked"]]
    assert locked
    assert facts["axes"][-len(locked) :] == locked
    assert all(isinstance(row["locked"], str) for row in facts["axes"])


def test_layers_add_up(residual: Network) -> None:
    facts = inspect_network(residual)
    assert sum(row["macs"] for row in facts["layers"]) == facts["macs"] == macs(residual).total
    assert sum(row["macs_share"] for row in facts["layers"]) == pytest.approx(1)
    first = facts["layers"][0]
    assert (first["layer"], first["shape"], first["macs"]) == ("stem.weight", "6x3x3x3", 64 * 162)
    assert facts["bytes"] == residual.nbytes


def test_products_of_activations_are_said() -> None:
    facts = inspect_network(Network.of(Attention(), torch.randn(2, 6, 8)))
    assert any("products of activations" in note for note in facts["notes"])
    assert sum(row["macs"] for row in facts["layers"]) == 6 * (8 * 24 + 64)


def test_an_operator_without_a_rule_is_named() -> None:
    facts = inspect_network(Network.of(Strange(), torch.randn(2, 4)))
    assert any("operator sort has no rule" in note for note in facts["notes"])
    assert facts["axes_that_can_shrink"] == 0
    assert facts["smallest_parameters"] == facts["parameters"]


@pytest.mark.parametrize("as_json", [False, True])
def test_it_can_be_shown(residual: Network, as_json: bool, capsys: Any) -> None:
    show(inspect_network(residual), as_json)
    out = capsys.readouterr().out
    assert "stem.weight" in out
    assert ("tied" in out) == as_json


def test_resnet_20(repo_root: Path) -> None:
    network = open_network(f"{repo_root}/examples/models/cifar_resnet.py:resnet20", size=32)
    facts = inspect_network(network)
    inner = [r for r in facts["axes"] if r["axis"].endswith("conv1.weight") and not r["locked"]]
    assert len(inner) >= 9
    row = next(r for r in inner if r["axis"] == "layer1.0.conv1.weight")
    assert row["macs_per_unit"] == 2 * 16 * 9 * 1024
    assert row["parameters_per_unit"] == 2 * 16 * 9 + 2
    assert row["macs_share"] == pytest.approx(16 * row["macs_per_unit"] / facts["macs"])
