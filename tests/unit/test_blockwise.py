"""Networks learned block by block, and the segments that they are learned in."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from lighten.blockwise import held_quarter, learn_blocks
from lighten.errors import BadInput, WrongUse
from lighten.network import Network
from lighten.quantize_network import quality, quantize
from lighten.quantized import Quantized
from lighten.registry import transforms
from lighten.segments import segments
from lighten.simulate import Simulation
from lighten.trainable import trainable


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
        self.one = nn.Conv2d(8, 16, 1)
        self.two = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.three = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.three(torch.relu(self.two(torch.relu(self.one(x)))))
        return self.head(x.mean((2, 3)).view(x.shape[0], -1))


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return Network.of(Residual(), torch.randn(1, 3, 10, 10))


@pytest.fixture(scope="module")
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.nn.functional.interpolate(torch.randn(64, 3, 4, 4), 10, mode="bilinear") * 2


def test_segments_are_the_whole_graph_and_give_what_it_gives(
    network: Network, images: Tensor
) -> None:
    graph = transforms["fold_batchnorm"](network, images).flexible
    weights = {n for n, _ in graph.named_parameters() if n.endswith("weight")}
    every = {n.name for n in graph.graph.nodes}
    found = segments(graph, weights, every)
    assert [s.target.name for s in found] == ["conv2d", "add", "linear"]
    nodes = [n.name for s in found for n in s.nodes]
    assert sorted(nodes) == sorted(n.name for n in graph.graph.nodes if n.op == "call_function")
    x = images
    for segment in found:
        x = segment.run(graph, x, lambda node, value: value)
    assert torch.allclose(x, network(images), atol=1e-5)


def test_a_residual_is_one_segment(network: Network, images: Tensor) -> None:
    graph = transforms["fold_batchnorm"](network, images).flexible
    weights = {n for n, _ in graph.named_parameters() if n.endswith("weight")}
    found = segments(graph, weights, {n.name for n in graph.graph.nodes})
    around = next(s for s in found if any(n.name == "add" for n in s.nodes))
    names = [n.name for n in around.nodes]
    assert sum("conv" in n for n in names) == 3


def test_segments_end_where_they_may(network: Network, images: Tensor) -> None:
    graph = transforms["fold_batchnorm"](network, images).flexible
    weights = {n for n, _ in graph.named_parameters() if n.endswith("weight")}
    (whole,) = segments(graph, weights, {})
    assert whole.target.name == "linear"


def wrong_steps(made: Quantized) -> Quantized:
    """Steps and biases that are some per cent off, at random."""
    twin = trainable(made, "scales")
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in twin.parameters():
            if p.requires_grad:
                p += 0.08 * torch.randn(p.shape, generator=g)
    return twin.freeze()


@pytest.mark.parametrize("mode", ["scales", "all"])
def test_no_block_gets_worse_on_held_out_images_and_the_whole_gets_better(
    network: Network, images: Tensor, mode: str
) -> None:
    seen = images[:40]
    dense = transforms["fold_batchnorm"](network, seen)
    good = quantize(network, seen[~held_quarter(40)], bits_weights=4)
    made = wrong_steps(good)
    found, blocks = learn_blocks(made, dense, seen, steps=60, rate=2e-3, mode=mode)
    assert all(b.after <= b.before for b in blocks)
    assert any(b.after < 0.5 * b.before for b in blocks)
    before = quality(made, network, images[40:])
    assert before < quality(good, network, images[40:]) - 6
    assert quality(found, network, images[40:]) > before + 3


def test_no_steps_change_nothing_and_a_seed_is_a_seed(network: Network, images: Tensor) -> None:
    dense = transforms["fold_batchnorm"](network, images)
    made = quantize(network, images[:40], bits_weights=4, solver="rtn")
    same, _ = learn_blocks(made, dense, images[:40], steps=0)
    assert torch.equal(Simulation(same)(images), Simulation(made)(images))
    one, two = (learn_blocks(made, dense, images[:40], steps=8, rate=1e-3)[0] for _ in range(2))
    assert torch.equal(Simulation(one)(images), Simulation(two)(images))


def test_mistakes_are_named(network: Network, images: Tensor) -> None:
    made = quantize(network, images[:20], solver="rtn")
    with pytest.raises(WrongUse, match="transforms"):
        learn_blocks(made, Network.of(nn.Linear(3, 3), torch.randn(1, 3)), images[:20])
    with pytest.raises(BadInput, match="3 images"):
        learn_blocks(made, made.network, images[:3])


@pytest.mark.parametrize(
    ("count", "most", "size", "held"),
    [(40, None, 1, 10), (3, None, 1, 0), (320, 32, 2, 32), (13, 32, 2, 2), (100, 16, 1, 16)],
)
def test_what_is_held_out_is_spread_evenly(
    count: int, most: int | None, size: int, held: int
) -> None:
    found = held_quarter(count, most, size)
    assert found.shape == (count,)
    assert int(found.sum()) == held
    if held:
        at = [-1, *found.nonzero().flatten().tolist()]
        assert at[-1] == count - 1
        apart = [b - a for a, b in pairwise(at)]
        assert max(apart) - min(apart) <= 1
