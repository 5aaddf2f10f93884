"""Curves: what is measured, what is between, which units go first."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lighten.coupling import couple
from lighten.curves import _between, curves
from lighten.network import Network
from lighten.stepwise import divergence


def made() -> tuple[Network, torch.Tensor]:
    """Of 12 inner channels 4 are dead, and 2 repeat others."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 6, 3),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    ).eval()  # fmt: skip
    with torch.no_grad():
        module[1].bias[:4] = -100
        module[0].weight[4:6] = module[0].weight[6:8]
        module[7].weight *= 20
    x = torch.randn(64, 3, 10, 10)
    return Network.of(module, x[:1]), x


def test_what_is_redundant_goes_first_and_costs_nothing() -> None:
    network, x = made()
    couplings = couple(network)
    ticks: list[int] = []
    found = curves(network, couplings, x, measured=32, tick=ticks.append)
    assert set(found) == {a.name for a in couplings.free} == {"0.weight", "3.weight"}
    assert sum(ticks) == 2
    curve = found["0.weight"]
    first = set(curve.order[:6].tolist())
    assert {0, 1, 2, 3} <= first
    assert len({4, 6} & first) == len({5, 7} & first) == 1
    error = curve.error
    assert error.shape == (13,)
    assert math.isinf(error[0])
    assert error[12] == 0
    assert float(error[6]) < 1e-6 < 1e-4 < float(error[1])


def test_measured_points_are_on_the_curve() -> None:
    network, x = made()
    couplings = couple(network)
    one = curves(network, couplings, x, measured=32, shares=(0.25,))
    two = curves(network, couplings, x, measured=32, shares=(0.0, 0.25, 0.5))
    torch.testing.assert_close(one["0.weight"].error[3], two["0.weight"].error[3])
    assert torch.equal(one["0.weight"].order, two["0.weight"].order)


def test_an_axis_with_no_reader_to_compensate_still_has_a_curve() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 25, 5),
    ).eval()  # fmt: skip
    with torch.no_grad():
        module[0].weight[2] = 1e-6
        module[0].bias[2] = 0
    x = torch.randn(16, 3, 6, 6)
    network = Network.of(module, x[:1])
    couplings = couple(network)
    name = "0.weight"
    if couplings[name].locked is not None:
        pytest.skip("transposed convolutions lock what they read")
    curve = curves(network, couplings, x)[name]
    assert int(curve.order[0]) == 2
    assert float(curve.error[7]) < float(curve.error[2])


def test_between_points_the_ratio_is_interpolated() -> None:
    error = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    found = _between(error, {1: 0.4, 3: 0.1}, 4)
    assert found[1:].tolist() == pytest.approx([0.4, 0.2, 0.1, 0.0])
    assert math.isinf(found[0])


def test_divergence_is_that_of_softmax() -> None:
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    expected = nn.functional.kl_div(
        b.log_softmax(1), a.log_softmax(1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(divergence(a, b), expected)
    assert float(divergence(a, a)) == 0
    maps = torch.randn(2, 5, 3, 3)
    rows = maps.movedim(1, -1).reshape(-1, 5)
    torch.testing.assert_close(divergence(maps, maps + 1), divergence(rows, rows + 1))
