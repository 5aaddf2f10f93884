"""The simulation beside integer arithmetic and beside the real runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lighten.network import Network
from lighten.quantize_network import quantize
from lighten.quantized import Edge, Quantized
from lighten.registry import exporters, solvers
from lighten.simulate import Simulation, bias_steps, round_bias
from lighten.types import Spec


def test_a_layer_computes_what_integers_give() -> None:
    torch.manual_seed(0)
    network = Network.of(nn.Sequential(nn.Linear(16, 6), nn.ReLU()), torch.randn(1, 16))
    state = dict(network.flexible.named_parameters())
    (weight,) = (name for name in state if name.endswith("weight"))
    (bias,) = (name for name in state if name.endswith("bias"))
    code = solvers["rtn"](state[weight], None, Spec("int8_channel_sym"))
    names = [n.name for n in network.graph.graph.nodes]
    given, out = names[2], "relu"
    edges = {given: Edge(0.03, 120), out: Edge(0.01, 0)}
    x = torch.randn(9, 16)
    got = Simulation(Quantized(network, {weight: code}, edges))(x)

    q = torch.clamp(torch.round(x / 0.03) + 120, 0, 255).long() - 120
    codes, grid = code.format.unpack(code.parts, code.shape)
    steps = bias_steps(edges[given], code)
    total = q @ (codes.long() - 128).T + torch.round(state[bias] / steps).long()
    level = torch.clamp(torch.round(total * steps.double() / 0.01), 0, 255)
    assert torch.allclose(got.double(), level * 0.01, atol=1e-5)
    assert len(grid["scale"]) == 6


def test_biases_lie_on_their_grid() -> None:
    steps = torch.tensor([0.5, 0.0, 1e-3])
    assert torch.equal(
        round_bias(torch.tensor([0.7, 0.3, 0.0124]), steps), torch.tensor([0.5, 0.3, 12 * 1e-3])
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_the_runtime_is_within_a_step(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from lighten.runtimes.onnxruntime import Session

    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    network = Network.of(module, torch.randn(1, 3, 16, 16))
    made = quantize(network, torch.randn(30, 3, 16, 16), bits_weights=bits)
    path = tmp_path / "small.onnx"
    exporters["onnx"].write(made, path)
    x = torch.randn(7, 3, 16, 16)
    ours, theirs = Simulation(made)(x), Session(path)(x)[0]
    # a rounding that falls on a tie may go either way in each of three layers
    assert float((ours - theirs).abs().quantile(0.99)) < 1e-4 * float(ours.abs().max())
    assert float((ours - theirs).abs().max()) < 0.05 * float(ours.abs().max())
