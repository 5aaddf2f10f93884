"""Multiply-accumulates against counts by hand and against a count of torch's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lighten.macs import Macs, macs, weight_macs
from lighten.network import Network


class Calls(nn.Module):
    """A function of an input and parameters w0, w1, ... of given shapes."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for i, shape in enumerate(shapes):
            self.register_parameter(f"w{i}", nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *(p for n, p in self.named_parameters()))


class First(nn.Module):
    """A recurrent layer's outputs without its states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)[0]


def count(module: nn.Module, *shape: int) -> Macs:
    return macs(Network.of(module, torch.randn(shape)))


HAND: list[tuple[str, nn.Module, tuple[int, ...], int, dict[str, float]]] = [
    ("conv", nn.Conv2d(3, 8, 3, padding=1), (2, 3, 6, 5), 30 * 8 * 27, {"weight": 30}),
    ("stride", nn.Conv2d(3, 8, 3, 2), (2, 3, 7, 7), 9 * 8 * 27, {"weight": 9}),
    ("depthwise", nn.Conv2d(8, 8, 3, groups=8), (2, 8, 5, 5), 9 * 8 * 9, {"weight": 9}),
    ("grouped", nn.Conv2d(8, 4, 1, groups=2), (1, 8, 5, 5), 25 * 4 * 4, {"weight": 25}),
    ("same", nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 5, 5), 25 * 4 * 27, {"weight": 25}),
    ("1d", nn.Conv1d(3, 4, 5), (2, 3, 9), 5 * 4 * 15, {"weight": 5}),
    ("3d", nn.Conv3d(1, 2, 2), (2, 1, 3, 3, 3), 8 * 2 * 8, {"weight": 8}),
    ("transposed", nn.ConvTranspose2d(4, 6, 2, 2), (2, 4, 3, 3), 9 * 4 * 6 * 4, {"weight": 9}),
    ("linear", nn.Linear(5, 7), (2, 5), 35, {"weight": 1}),
    ("tokens", nn.Linear(5, 7), (2, 4, 5), 140, {"weight": 4}),
    ("lstm", First(nn.LSTM(5, 3, batch_first=True)), (2, 6, 5), 6 * 12 * 8,
     {"layer.weight_ih_l0": 6, "layer.weight_hh_l0": 6}),
    ("gru", First(nn.GRU(5, 3, 2, bidirectional=True, batch_first=True)), (2, 6, 5),
     6 * 2 * (9 * 8 + 9 * 9), {"layer.weight_ih_l1_reverse": 6, "layer.weight_hh_l0": 6}),
    ("cell", nn.GRUCell(5, 3), (2, 5), 9 * 8, {"weight_ih": 1, "weight_hh": 1}),
    ("bilinear", Calls(lambda x, w: F.bilinear(x, x, w), (3, 4, 4)), (2, 4), 48, {"w0": 1}),
    ("functional", Calls(lambda x, w: F.linear(x, w), (3, 4)), (2, 4), 12, {"w0": 1}),
    ("matmul", Calls(lambda x, w: x @ w, (4, 3)), (2, 5, 4), 60, {"w0": 5}),
    ("left", Calls(lambda x, w: w @ x, (3, 4)), (2, 4, 5), 60, {"w0": 5}),
    ("view", Calls(lambda x, w: x @ w.view(2, 6).t(), (3, 4)), (2, 6), 12, {"w0": 1}),
    ("addmm", Calls(lambda x, b, w: torch.addmm(b, x, w), (3,), (4, 3)), (2, 4), 12, {"w1": 1}),
    ("vector", Calls(lambda x, w: x @ w, (4,)), (2, 5, 4), 20, {"w0": 5}),
    ("scores", Calls(lambda x: x @ x.mT), (2, 5, 4), 100, {}),
    ("einsum", Calls(lambda x, w: torch.einsum("btc,oc->bto", x, w), (3, 4)), (2, 5, 4), 60,
     {"w0": 5}),
    ("implicit", Calls(lambda x, w: torch.einsum("bc,co", x, w), (4, 3)), (2, 4), 12, {"w0": 1}),
    ("ellipsis", Calls(lambda x, w: torch.einsum("...c,co->...o", x, w), (4, 3)), (2, 5, 4), 60,
     {"w0": 5}),
    ("chain", Calls(lambda x, w, v: torch.einsum("bc,ch,ho->bo", x, w, v), (4, 3), (3, 2)),
     (2, 4), 12 + 6, {"w0": 1, "w1": 1}),
    ("attention", Calls(lambda x: F.scaled_dot_product_attention(x, x, x)), (2, 3, 5, 4),
     3 * 25 * 8, {}),
    ("twice", Calls(lambda x, w: F.linear(F.linear(x, w), w), (4, 4)), (2, 4), 32, {"w0": 2}),
    ("norm", nn.LayerNorm(4), (2, 4), 0, {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "shape", "total", "positions"), [h[1:] for h in HAND], ids=[h[0] for h in HAND]
)
def test_counts_by_hand(
    module: nn.Module, shape: tuple[int, ...], total: int, positions: dict[str, float]
) -> None:
    found = count(module, *shape)
    assert found.total == total
    assert sum(found.by_node.values()) == total
    assert positions.items() <= found.positions.items()


def test_an_embedding_multiplies_nothing_and_its_head_does() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.embed(x), self.embed.weight)

    found = macs(Network.of(Tied(), torch.zeros(2, 5, dtype=torch.long)))
    assert found.total == 5 * 36
    assert found.positions == {"embed.weight": 5}


def test_the_batch_does_not_matter() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 5))
    one, many = count(net, 1, 3, 5, 5), count(net, 7, 3, 5, 5)
    assert one == many
    assert weight_macs(one, net.state_dict()) == {"0.weight": 9 * 108, "2.weight": 180}
    assert sum(weight_macs(one, net.state_dict()).values()) == one.total


def examples(root: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, root / "examples/models" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_resnet_56_by_hand(repo_root: Path) -> None:
    """conv1 on 32x32; three stages of 18 convolutions, each first of a wider stage half as dear."""
    found = count(examples(repo_root, "cifar_resnet").resnet56(), 2, 3, 32, 32)
    first = 3 * 16 * 9 * 32 * 32
    stage = 16 * 16 * 9 * 32 * 32  # as much on 32x32x16 as on 16x16x32 and on 8x8x64
    assert found.total == first + 18 * stage + 2 * (17 * stage + stage // 2) + 64 * 10
    assert found.total == 125_485_696
    assert found.positions["layer2.0.conv1.weight"] == 256


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_torch_counts_the_same(width: float, repo_root: Path) -> None:
    net = examples(repo_root, "mobilenet").mobilenet(width).eval()
    x = torch.randn(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    assert 2 * count(net, 1, 3, 32, 32).total == counter.get_total_flops()


def test_torch_counts_the_same_in_a_transformer() -> None:
    net = nn.TransformerEncoderLayer(
        16, 4, 32, batch_first=True
    ).train()  # eval: one fused operator
    x = torch.randn(1, 6, 16)
    with FlopCounterMode(display=False) as counter:
        net(x)
    assert 2 * count(net, 1, 6, 16).total == counter.get_total_flops()
