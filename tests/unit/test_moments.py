"""Hessians and sampled rows against the operators themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lighten.errors import BadInput, WrongUse
from lighten.moments import hessians
from lighten.network import Network, weighted
from lighten.patches import Window

CONVS = {
    "plain": (nn.Conv2d(4, 6, 3, padding=1), (4, 9, 7)),
    "strided": (nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0)), (4, 9, 8)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=(2, 1), padding=2), (4, 9, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (4, 6, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 6, 5)),
    "same": (nn.Conv2d(4, 6, (4, 3), padding="same"), (4, 7, 6)),
    "one dimension": (nn.Conv1d(4, 6, 3, padding=2, stride=2), (4, 11)),
    "three dimensions": (nn.Conv3d(2, 3, (2, 3, 1), padding=(1, 0, 1)), (2, 4, 5, 3)),
    "linear": (nn.Linear(5, 3), (5,)),
    "linear on tokens": (nn.Linear(5, 3), (7, 5)),
}


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("name", CONVS)
def test_rows_times_weight_are_the_outputs(name: str) -> None:
    module, shape = CONVS[name]
    torch.manual_seed(0)
    x = torch.randn(3, *shape)
    network = Network.of(module, x)
    node, _ = next(iter(weighted(network.graph)))
    window = Window.of(node)
    assert window is not None
    with torch.no_grad():
        y = module(x)
    for share in (1.0, 0.4):
        at = window.positions(y, share, torch.Generator().manual_seed(1))
        rows, targets = window.inputs(x, at), window.outputs(y, at)
        weight = module.weight.detach().flatten(1)
        w = weight.view(window.groups, -1, weight.shape[1])
        made = (rows @ w.transpose(1, 2)).transpose(0, 1).flatten(1) + module.bias.detach()
        torch.testing.assert_close(made, targets, atol=1e-5, rtol=1e-5)
    assert len(at) < y.numel() / y.shape[1 if window.kernel else -1] or shape == (5,)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, groups=1)
        self.part = nn.Conv2d(4, 4, 1, groups=2)
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.part(self.conv(x).relu_()).mean((2, 3)))
        return y


def test_all_positions_give_the_exact_moments() -> None:
    torch.manual_seed(0)
    module, x = Two().eval(), torch.randn(10, 3, 6, 6)
    found = hessians(Network.of(module, x[:1]), x, rows=10**9, batch=4)
    assert set(found) == {"conv.weight", "part.weight", "linear.weight"}
    patches = nn.functional.unfold(x, 3).transpose(1, 2).flatten(0, 1)
    stats = found["conv.weight"]
    assert stats.n == len(patches)
    assert stats.mean is not None
    torch.testing.assert_close(stats.hessian, patches.T @ patches / len(patches))
    torch.testing.assert_close(stats.mean, patches.mean(0), atol=1e-5, rtol=1e-4)
    inner = module.conv(x).relu().detach().transpose(0, 1).flatten(1)
    part = found["part.weight"].hessian
    assert part.shape == (2, 2, 2)
    torch.testing.assert_close(part[1], inner[2:] @ inner[2:].T / inner.shape[1])


def test_few_rows_are_close_repeatable_and_counted() -> None:
    torch.manual_seed(0)
    module, x = Two().eval(), torch.randn(64, 3, 12, 12)
    network = Network.of(module, x[:1])
    whole = hessians(network, x, rows=10**9, names=["conv.weight"])["conv.weight"]
    some = hessians(network, x, rows=2000, names=["conv.weight"])["conv.weight"]
    again = hessians(network, x, rows=2000, names=["conv.weight"])["conv.weight"]
    assert 2000 <= some.n < 2200 < whole.n
    assert torch.equal(some.hessian, again.hessian)
    assert float((some.hessian - whole.hessian).norm() / whole.hessian.norm()) < 0.2


def test_mistakes_are_named() -> None:
    network = Network.of(Two(), torch.zeros(1, 3, 6, 6))
    with pytest.raises(BadInput, match=r"conv\.weight"):
        hessians(network, torch.full((2, 3, 6, 6), torch.nan))

    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    with pytest.raises(WrongUse, match="2 inputs"):
        hessians(Network.of(Sum(), (torch.zeros(1, 2), torch.zeros(1, 2))), torch.zeros(2, 2))
