"""Compensation of narrower networks: exact where it can be, better where it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lighten.compensate import compensate
from lighten.coupling import couple
from lighten.errors import WrongUse
from lighten.fit import Problem, fit
from lighten.network import Network
from lighten.shrink import shrink


class Residual(nn.Module):
    """Batch norms, a residual sum, a depthwise convolution, a bias-free head."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.up = nn.Conv2d(8, 16, 1)
        self.bn1 = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 8, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu_()
        y = nn.functional.relu6(self.bn1(self.up(x)))
        y = self.bn3(self.down(self.bn2(self.deep(y)).relu()))
        y = (x + y).relu()
        out: Tensor = self.head(y.mean((2, 3)))
        return out


def network(bias: bool = True) -> tuple[Network, Tensor]:
    torch.manual_seed(0)
    module = Residual(bias)
    x = torch.randn(192, 3, 8, 8)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0.2, 0.3)
    with torch.no_grad():
        for _ in range(20):
            module(x)
    return Network.of(module.eval(), x[:1]), x


def error(a: Network, b: Network, x: Tensor) -> float:
    return float((a(x) - b(x)).square().mean() / a(x).var())


@pytest.mark.parametrize("bias", [True, False])
def test_compensation_lowers_the_error_on_new_data(bias: bool) -> None:
    dense, x = network(bias)
    fit_on, held = x[:128], x[128:]
    couplings = couple(dense)
    assert {a.width for a in couplings.free} == {8, 16}
    keep = {a.name: torch.arange(a.width // 4, a.width) for a in couplings.free}
    small = shrink(dense, couplings, keep)
    better = compensate(dense, small, couplings, keep, fit_on)
    assert error(dense, better, held) < 0.5 * error(dense, small, held)
    same = {k: v.shape for k, v in small.module.state_dict().items()}
    assert {k: v.shape for k, v in better.module.state_dict().items()} == same
    assert type(better.module) is type(small.module)


def test_it_changes_neither_network_and_repeats() -> None:
    dense, x = network()
    couplings = couple(dense)
    keep = {couplings.free[0].name: torch.arange(couplings.free[0].width - 2)}
    small = shrink(dense, couplings, keep)
    digests = dense.digest, small.digest
    one = compensate(dense, small, couplings, keep, x[:64], rows=500)
    two = compensate(dense, small, couplings, keep, x[:64], rows=500)
    assert (
        Network.of(dense.module, x[:1]).digest,
        Network.of(small.module, x[:1]).digest,
    ) == digests
    assert one.digest == two.digest != small.digest


def test_a_redundant_channel_costs_nothing() -> None:
    """Channel 3 repeats channel 5: without it the network can be what it was."""
    torch.manual_seed(1)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3),
        nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3),
    ).eval()  # fmt: skip
    with torch.no_grad():
        module[0].weight[3] = module[0].weight[5]
    x = torch.randn(128, 3, 8, 8)
    dense = Network.of(module, x[:1])
    couplings = couple(dense)
    axis = next(a for a in couplings.free if a.name == "0.weight")
    keep = {axis.name: torch.tensor([0, 1, 2, 4, 5, 6, 7])}
    small = shrink(dense, couplings, keep)
    better = compensate(dense, small, couplings, keep, x, ridge=1e-9)
    assert error(dense, small, x) > 1e-3
    assert error(dense, better, x) < 1e-6


def test_nothing_removed_changes_nothing() -> None:
    dense, x = network()
    couplings = couple(dense)
    same = compensate(dense, shrink(dense, couplings, {}), couplings, {}, x)
    assert same.digest == dense.digest


class Encoder(nn.Module):
    """Attention of torch's own: where it is cut, its graph has other arithmetic of sizes."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).mean(1))
        return out


def test_attention_with_sizes_of_its_own_is_compensated() -> None:
    torch.manual_seed(0)
    x = torch.randn(192, 6, 16) @ torch.randn(16, 16)
    dense = Network.of(Encoder(), x[:2])
    couplings = couple(dense)
    keep = {a.name: torch.arange(a.width // 4, a.width) for a in couplings.free}
    assert {a.width for a in couplings.free} >= {4, 32}  # heads and the feed-forward part
    small = shrink(dense, couplings, keep)
    better = compensate(dense, small, couplings, keep, x[:128])
    assert error(dense, better, x[128:]) < 0.5 * error(dense, small, x[128:])


def test_each_weight_ticks_once() -> None:
    dense, x = network()
    couplings = couple(dense)
    keep = {couplings.free[0].name: torch.arange(couplings.free[0].width - 1)}
    ticks: list[int] = []
    compensate(dense, shrink(dense, couplings, keep), couplings, keep, x, tick=ticks.append)
    assert sum(ticks) == len(dense.layers)


def test_another_network_is_refused() -> None:
    dense, x = network()
    other = Network.of(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), x[:1])
    with pytest.raises(WrongUse, match="other operators"):
        compensate(dense, other, couple(dense), {}, x)


def test_fit_is_least_squares_and_frees_what_is_cut_off() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 400, 3)
    weight, bias = torch.randn(4, 3), torch.randn(4)
    start = torch.zeros(4, 3)
    exact = Problem(x, torch.zeros(400, 4))
    target = exact.predict(weight, bias)
    w, b = fit(Problem(x, target), start, 1e-9)
    torch.testing.assert_close(w, weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(b, bias, atol=1e-4, rtol=1e-4)
    # what lies below the cut is worthless: rounds undo it, plain least squares does not
    spoilt = torch.where(target < 0, target - 3 * torch.rand(400, 4), target)
    p = Problem(x, spoilt, None, 0.0)
    plain, freed = fit(p, start, 1e-9), fit(p, start, 1e-9, rounds=50)
    assert p.error(*freed) < 0.1 * p.error(*plain)


def test_few_rows_are_drawn_towards_the_start() -> None:
    torch.manual_seed(0)
    start = torch.randn(3, 40)
    x = torch.randn(1, 50, 40)
    noisy = x[0] @ start.T + torch.randn(50, 3)
    w, _ = fit(Problem(x, noisy), start, 1e-6)
    assert float((w - start).norm()) < 0.5 * float(start.norm())
