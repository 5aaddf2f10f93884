"""The trainable twin of a quantized network: equal to the simulation, and to what it freezes to."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lighten.errors import WrongUse
from lighten.learned_grids import CODES, EdgeGrid, WeightGrid
from lighten.network import Network
from lighten.quantize_network import quantize
from lighten.quantized import Edge, Quantized
from lighten.ranges import quantize_values
from lighten.registry import exporters, solvers
from lighten.simulate import Simulation
from lighten.trainable import Trainable, trainable
from lighten.types import Compressed, Spec


class Small(nn.Module):
    """A stem that clips at both ends, depthwise, a sum, a concat, a pooling, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.point(torch.relu(self.depthwise(x)))
        x = torch.cat([torch.relu(x), nn.functional.max_pool2d(x, 3, 1, 1)], 1)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return Network.of(Small(), torch.randn(1, 3, 10, 10))


@pytest.fixture(scope="module")
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.nn.functional.interpolate(torch.randn(40, 3, 4, 4), 10, mode="bilinear") * 2


@pytest.fixture(scope="module", params=[(8, 8), (4, 8), (4, 4)], ids=["w8a8", "w4a8", "w4a4"])
def made(request: pytest.FixtureRequest, network: Network, images: Tensor) -> Quantized:
    weights, activations = request.param
    return quantize(network, images[:20], bits_weights=weights, bits_activations=activations)


def moved(twin: Trainable, size: float = 0.01, seed: int = 3) -> Trainable:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in twin.parameters():
            if p.requires_grad:
                p += size * torch.randn(p.shape, generator=g)
    return twin


@pytest.mark.parametrize("mode", ["scales", "all"])
def test_it_begins_as_the_simulation_and_freezes_to_what_it_was(
    made: Quantized, images: Tensor, mode: str
) -> None:
    twin = trainable(made, mode)
    x = images[20:]
    assert torch.equal(twin(x), Simulation(made)(x))
    same = twin.freeze()
    assert same.edges == made.edges
    assert all(torch.equal(w.dense(), made.weights[n].dense()) for n, w in same.weights.items())


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("mode", ["scales", "all"])
def test_what_is_frozen_computes_what_was_trained(
    made: Quantized, images: Tensor, mode: str, zeros: bool
) -> None:
    twin = moved(trainable(made, mode, zeros=zeros), 0.03)
    for edge in twin.edges.values():
        if edge.zero.requires_grad:  # type: ignore[union-attr]
            nn.init.constant_(edge.zero, 1.2 / CODES)  # type: ignore[arg-type]
    frozen = twin.freeze()
    x = images[20:]
    assert not torch.allclose(twin(x), Simulation(made)(x), atol=1e-3)
    assert torch.equal(twin(x), Simulation(frozen)(x))
    assert frozen.edges.keys() == made.edges.keys()
    changed = [n for n, e in frozen.edges.items() if e.zero != made.edges[n].zero]
    assert bool(changed) == zeros
    for name, weight in frozen.weights.items():
        assert weight.format is made.weights[name].format
        assert {k: p.shape for k, p in weight.parts.items()} == {
            k: p.shape for k, p in made.weights[name].parts.items()
        }
        kept = torch.equal(weight.parts["codes"], made.weights[name].parts["codes"])
        assert kept == (mode == "scales") or name == "depthwise.weight"


def test_what_was_given_does_not_change(made: Quantized, images: Tensor) -> None:
    before = Simulation(made)(images)
    state = {n: t.clone() for n, t in made.network.module.state_dict().items()}
    moved(trainable(made, "all"), 0.1).freeze()
    assert torch.equal(Simulation(made)(images), before)
    assert all(torch.equal(t, made.network.module.state_dict()[n]) for n, t in state.items())


def test_everything_that_is_learned_has_a_gradient(made: Quantized, images: Tensor) -> None:
    twin = trainable(made, "all")
    twin(images).square().sum().backward()
    for name, p in twin.named_parameters():
        assert p.requires_grad == (p.grad is not None), name
    assert all(bool(w.codes.grad.any()) for w in twin.weights.values())  # type: ignore[union-attr]


def test_edges_that_move_numbers_stay_equal(made: Quantized) -> None:
    frozen = moved(trainable(made, "all"), 0.05).freeze()
    pools = [n for n in frozen.edges if n.startswith("max_pool")]
    assert pools
    for pool in pools:
        node = next(n for n in made.network.flexible.graph.nodes if n.name == pool)
        assert frozen.edges[pool] == frozen.edges[node.args[0].name]


def test_a_step_of_an_edge_learns_as_lsq_does() -> None:
    edge = Edge(0.25, 3, 4)
    grid = EdgeGrid(edge)
    x = torch.tensor([-9.0, -0.3, 0.05, 0.4, 1.9, 50.0], requires_grad=True)
    y = grid(x)
    assert torch.equal(y, quantize_values(x.detach(), edge))
    pull = torch.tensor([1.0, -2.0, 3.0, 0.5, 1.5, 2.0])
    (y * pull).sum().backward()
    u = x.detach() / 0.25
    inside = (u.round() + 3 >= 0) & (u.round() + 3 <= 15)
    level = torch.where(inside, u.round() - u, torch.where(u < 0, -3.0, 12.0))
    factor = 1 / math.sqrt(x[:1].numel() * 15)
    assert grid.scale.grad is not None
    # the parameter is the logarithm of the step
    assert float(grid.scale.grad) == pytest.approx(
        float((pull * level).sum()) * factor * 0.25, rel=1e-4
    )
    assert torch.equal(x.grad, pull * inside)


def test_a_step_of_a_weight_learns_as_lsq_does() -> None:
    torch.manual_seed(0)
    code: Compressed = solvers["rtn"](torch.randn(3, 16), None, Spec("int4_channel_sym"))
    grid = WeightGrid("w", code, code.dense() + 1e-9)  # a float weight of 0 would be a pruned one
    with torch.no_grad():
        grid.codes += torch.randn(3, 16) / CODES
    dense = grid()
    pull = torch.randn(3, 16)
    (dense * pull).sum().backward()
    start, steps = code.format.unpack(code.parts, code.shape)
    w = (start.float() - 8 + CODES * grid.codes.detach()) * steps["scale"]
    u = w / steps["scale"]
    assert torch.equal(dense.detach(), u.round().clamp(-8, 7) * steps["scale"])
    level = torch.where((u >= -8) & (u <= 7), u.round() - u, u.clamp(-8, 7))
    want = (pull * level * steps["scale"]).sum(1) / math.sqrt(16 * 7)
    assert torch.allclose(grid.scale.grad[:, 0], want, atol=1e-5)


def test_an_edge_never_reaches_beyond_the_clip_before_it(made: Quantized) -> None:
    twin = trainable(made, "all")
    with torch.no_grad():
        for edge in twin.edges.values():
            edge.scale += 2  # type: ignore[operator]
    frozen = twin.freeze()
    assert frozen.edges["hardtanh"].high <= 6 + 1e-6
    assert frozen.edges["x"].scale > 5 * made.edges["x"].scale


@pytest.mark.parametrize("mode", ["scales", "all"])
def test_it_learns_back_what_wrong_steps_and_biases_lost(
    network: Network, images: Tensor, mode: str
) -> None:
    good = quantize(network, images[:20], bits_weights=4)
    made = moved(trainable(good, "scales"), 0.08).freeze()
    twin = trainable(made, mode)
    target = network(images)
    first = float((twin(images).detach() - target).square().mean())
    assert first > 10 * float((Simulation(good)(images) - target).square().mean())
    adam = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(60):
        loss = (twin(images) - target).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    after = float((Simulation(twin.freeze())(images) - target).square().mean())
    assert after < 0.2 * first


def test_groups_and_zeros_learn_too(images: Tensor) -> None:
    torch.manual_seed(0)
    network = Network.of(nn.Sequential(nn.Linear(64, 8), nn.ReLU()), torch.randn(1, 64))
    weight = network.module.state_dict()["0.weight"]
    code: Compressed = solvers["rtn"](weight, None, Spec("int4_g32"))
    made = Quantized(network, {"0.weight": code}, {})
    x = torch.randn(9, 64)
    twin = trainable(made)
    assert torch.equal(twin(x), Simulation(made)(x))
    assert torch.equal(moved(twin)(x), Simulation(twin.freeze())(x))


def test_rows_of_zeros_stay_rows_of_zeros(network: Network, images: Tensor) -> None:
    module = Small()
    with torch.no_grad():
        module.point.weight[2] = 0
    made = quantize(Network.of(module, images[:1]), images[:20], bits_weights=4, solver="rtn")
    twin = trainable(made)
    twin(images).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in twin.parameters() if p.requires_grad)
    frozen = moved(twin).freeze()
    assert not frozen.weights["point.weight"].dense()[2].any()


def test_mistakes_are_named(made: Quantized) -> None:
    with pytest.raises(WrongUse, match="`scale`"):
        trainable(made, "scale")
    name, weight = next(iter(made.weights.items()))
    other: Compressed = solvers["rtn"](weight.dense(), None, Spec("f16"))
    with pytest.raises(WrongUse, match="f16"):
        trainable(replace(made, weights={name: other}))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_file_has_the_same_form_and_computes_what_was_trained(
    network: Network, images: Tensor, tmp_path: Path, bits: int
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from lighten.runtimes.onnxruntime import Session

    before = quantize(network, images[:20], bits_weights=bits)
    twin = moved(trainable(before, "all"), 0.005)
    frozen = twin.freeze()
    operators = []
    for name, subject in (("before", before), ("after", frozen)):
        exporters["onnx"].write(subject, tmp_path / f"{name}.onnx")
        graph = onnx.load(tmp_path / f"{name}.onnx").graph
        operators.append([node.op_type for node in graph.node])
    assert operators[0] == operators[1]
    x = images[20:]
    with torch.no_grad():
        apart = (twin(x) - Session(tmp_path / "after.onnx")(x)[0]).abs()
    # the head multiplies a step of its input
    step = frozen.edges[list(frozen.edges)[-1]].scale
    reach = step * float(frozen.weights["head.weight"].dense().abs().max())
    assert float(apart.max()) < 1.01 * reach
    assert float(apart.median()) < 1e-4
