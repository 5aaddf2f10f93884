"""Edges of graphs, histograms, and the quantizers fitted to them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lighten.errors import BadInput
from lighten.network import Network
from lighten.quantized import Edge
from lighten.ranges import (
    METHODS,
    Histogram,
    edge_of,
    edges_of,
    fit_edge,
    fit_edges,
    observe,
    quantize_values,
)


def edges(module: nn.Module, outputs: bool = False) -> dict[str, str]:
    return edges_of(Network.of(module, torch.randn(1, 4, 8, 8)).graph, outputs)


def test_a_clip_is_the_edge_of_the_operator_before_it() -> None:
    found = edges(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 3)))
    assert found == {"input_1": "input_1", "hardtanh": "hardtanh"}


def test_other_activations_have_two_edges() -> None:
    found = edges(nn.Sequential(nn.Conv2d(4, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3)))
    assert found == {"input_1": "input_1", "conv2d": "conv2d", "silu": "silu"}


def test_moved_numbers_keep_their_edge_and_outputs_stay_float() -> None:
    module = nn.Sequential(
        nn.Conv2d(4, 4, 3),
        nn.MaxPool2d(2),
        nn.ConstantPad2d(1, 0.0),
        nn.Flatten(),
        nn.Linear(100, 3),
    )
    found = edges(module)
    assert {found[k] for k in ("max_pool2d", "pad", "flatten") if k in found} == {"conv2d"}
    assert "linear" not in found
    assert "linear" in edges(module, outputs=True)


def test_padding_with_another_number_is_no_move() -> None:
    found = edges(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ConstantPad2d(1, 3.0), nn.Conv2d(4, 4, 3)))
    assert found["pad"] == "pad"


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((self.conv(x) + x).relu())


def test_both_summands_are_edges_and_the_sum_is_one_after_its_relu() -> None:
    assert set(edges(Skip())) == {"x", "conv2d", "relu"}


def seen(values: torch.Tensor, pieces: int = 1) -> Histogram:
    histogram = Histogram()
    for piece in values.chunk(pieces):
        histogram.add(piece)
    return histogram


def test_histograms_count_everything_however_the_range_grows() -> None:
    values = torch.randn(4000) * torch.linspace(0.1, 5, 4000)
    whole, streamed = seen(values), seen(values, 40)
    assert whole.counts.sum() == streamed.counts.sum() == 4000
    assert (whole.low, whole.high) == (streamed.low, streamed.high)
    mean = (streamed.counts * streamed.centres()).sum() / 4000
    assert float(mean) == pytest.approx(float(values.mean()), abs=2e-3 * float(values.abs().max()))


def test_values_that_are_not_finite_are_named() -> None:
    with pytest.raises(BadInput, match="NaN or infinite"):
        seen(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantizers_represent_zero_and_stay_near(method: str, symmetric: bool, bits: int) -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(5000), torch.tensor([25.0])]) + 0.5
    edge = fit_edge(seen(x), bits, symmetric=symmetric, signed=symmetric, method=method)
    assert edge.first <= edge.zero <= edge.last
    assert edge.zero == 0 or not symmetric
    assert float(quantize_values(torch.zeros(1), edge)) == 0
    inside = x[(x > edge.low) & (x < edge.high)]
    assert float((quantize_values(inside, edge) - inside).abs().max()) <= edge.scale * 0.501


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_best_range_is_no_worse_than_the_whole(bits: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(20000) ** 3
    errors = {
        m: float((quantize_values(x, fit_edge(seen(x), bits, method=m)) - x).square().mean())
        for m in METHODS
    }
    assert errors["mse"] <= 1.001 * min(errors.values())
    assert bits == 8 or errors["mse"] < 0.9 * errors["minmax"]


def test_a_range_from_zero_never_reaches_beyond_its_bound() -> None:
    for bits in (4, 8):
        for high in (6.0, 0.1, 1.7, 5.999):
            edge = edge_of(0.0, high, bits, False, False)
            assert edge.zero == 0
            assert edge.low == 0
            assert edge.high <= high


def test_a_tensor_of_zeros_has_a_quantizer() -> None:
    edge = fit_edge(seen(torch.zeros(10)))
    assert edge == Edge(1.0, 0)
    assert float(quantize_values(torch.zeros(1), edge)) == 0


def test_edges_that_share_a_tensor_share_a_quantizer() -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1))
    network = Network.of(module, torch.randn(1, 4, 8, 8))
    found = edges_of(network.graph)
    histograms = observe(network.flexible, set(found.values()), torch.randn(9, 4, 8, 8).split(4))
    chosen = fit_edges(found, histograms)
    assert chosen["max_pool2d"] == chosen["conv2d"] != chosen["input_1"]
