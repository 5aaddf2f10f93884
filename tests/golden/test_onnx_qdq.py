"""ONNX files against onnxruntime: the numbers of a reference, by the operators of integers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lighten.cpu import saturates
from lighten.errors import BadInput, BadOutput, WrongUse
from lighten.network import Network
from lighten.quantized import Edge, Quantized
from lighten.registry import exporters
from lighten.runtimes import onnxruntime
from onnx_networks import EIGHT, Residual, Tokens, compressed, edge_of, network, quantized, values

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

FLOAT = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "Add", "Concat", "Relu", "Clip", "Pad"}


def written(subject: Network | Quantized, folder: Path) -> Path:
    path = folder / "net.onnx"
    exporters["onnx"].write(subject, path)
    return path


def sample(net: Network, count: int, seed: int = 1) -> Tensor:
    shape = (count, *net.inputs[0].shape[1:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps(q: Quantized, found: Tensor, x: Tensor) -> Tensor:
    """By how many steps of the last edge the outputs differ from the reference."""
    want = values(q.network, x, q)["output"]
    return (found - want).abs() / list(q.edges.values())[-1].scale


def as_it_is_written(path: Path, x: Tensor) -> list[Tensor]:
    """The outputs of a file of one input, nothing in its graph rewritten."""
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return [torch.from_numpy(each) for each in found]


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("kind", "shape"), [(Residual, (2, 3, 20, 20)), (Tokens, (1, 7, 64))])
def test_float_equals_torch_at_any_batch(
    kind: type[nn.Module], shape: tuple[int, ...], batch: int, tmp_path: Path
) -> None:
    net = network(kind, shape)
    x = sample(net, batch)
    [found] = onnxruntime.run(written(net, tmp_path), x)
    assert torch.allclose(found, net(x), atol=1e-5)


@pytest.mark.parametrize(
    "format", sorted({EIGHT, *(f"int{bits}_channel_sym" for bits in (7, 4, 3))})
)
@pytest.mark.parametrize(("kind", "shape"), [(Residual, (2, 3, 20, 20)), (Tokens, (2, 7, 64))])
def test_int8_is_within_one_step_and_runs_in_integers(
    kind: type[nn.Module], shape: tuple[int, ...], format: str, tmp_path: Path
) -> None:
    q = quantized(network(kind, shape), format)
    path = written(q, tmp_path)
    run = onnxruntime.operators(path)
    assert not set(run) & FLOAT
    assert run.get("QLinearConv", 0) + run.get("QGemm", 0) == 5
    for batch in (1, 5):
        x = sample(q.network, batch)
        apart = steps(q, onnxruntime.run(path, x)[0], x)
        assert apart.max() < 1.01
        assert (apart > 0.01).float().mean() < 0.1


@pytest.mark.parametrize(
    ("bits", "signed"), [(8, True), (16, False), (16, True), (4, False), (6, True)]
)
def test_other_edges_are_within_one_step(bits: int, signed: bool, tmp_path: Path) -> None:
    q = quantized(network(), bits=bits, signed=signed)
    x = sample(q.network, 3)
    apart = steps(q, onnxruntime.run(written(q, tmp_path), x)[0], x)
    # 16-bit steps are so small that float noise is some of them
    assert apart.max() < (1.01 if bits <= 8 else 8)


def test_simulation_says_the_same(tmp_path: Path) -> None:
    simulate = pytest.importorskip("lighten.simulate")
    q = quantized(network())
    x = sample(q.network, 4)
    [found] = onnxruntime.run(written(q, tmp_path), x)
    scale = list(q.edges.values())[-1].scale
    assert ((simulate.Simulation(q)(x) - found).abs() / scale).max() < 1.01


def test_unquantized_neighbours_stay_float(tmp_path: Path) -> None:
    net = network()
    whole = quantized(net)
    some = Quantized(net, {"point.weight": whole.weights["point.weight"]}, {})
    x = sample(net, 2)
    [found] = onnxruntime.run(written(some, tmp_path), x)
    assert torch.allclose(found, values(net, x, some)["output"], atol=1e-5)
    half = replace(whole, weights={"stem.weight": whole.weights["stem.weight"]})
    path = written(half, tmp_path)
    # optimized, the runtime rounds float weights between integer edges to 8 bits itself, and where
    # such products saturate that is what they do
    [found] = as_it_is_written(path, x) if saturates() else onnxruntime.run(path, x)
    assert steps(half, found, x).max() < 1.01


class Clipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.conv(x))


@pytest.mark.parametrize(
    ("edge", "kept"),
    [(Edge(6 / 255, 0), False), (Edge(2 / 255, 0), False), (Edge(9 / 255, 0), True),
     (Edge(6 / 255, 20), True), (Edge(6 / 65535, 0, 16), True)],
)  # fmt: skip
def test_a_clip_goes_only_where_rounding_does_its_work(
    edge: Edge, kept: bool, tmp_path: Path
) -> None:
    import onnx

    net = network(Clipped)
    with torch.no_grad():
        net.module.conv.weight.mul_(20)
    q = Quantized(net, {"conv.weight": compressed(net, "conv.weight", EIGHT)},
                  {"x": edge_of(net.inputs[0]), "relu6": edge})  # fmt: skip
    path = written(q, tmp_path)
    assert ("Clip" in {n.op_type for n in onnx.load(path).graph.node}) == kept
    assert steps(q, onnxruntime.run(path, net.inputs[0])[0], net.inputs[0]).max() < (
        1.01 if edge.bits == 8 else 8
    )


def test_dead_channels_and_biases_beyond_int32(tmp_path: Path) -> None:
    net = network(Clipped)
    with torch.no_grad():
        net.module.conv.weight[0] = 0
        net.module.conv.bias[0] = 2.5
        net.module.conv.weight[1] *= 1e-6
        net.module.conv.bias[1] = 1.5
    format = EIGHT
    q = Quantized(net, {"conv.weight": compressed(net, "conv.weight", format)},
                  {"x": edge_of(net.inputs[0]), "relu6": Edge(6 / 255, 0)})  # fmt: skip
    path = written(q, tmp_path)
    assert steps(q, onnxruntime.run(path, net.inputs[0])[0], net.inputs[0]).max() < 1.01


class Two(nn.Module):
    """Two inputs and two outputs; a value that is an output and is read on; two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(4, 8)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        left, right = torch.chunk(self.a(x), 2, -1)
        first = left * torch.sigmoid(right)
        return first, self.b(first) + y


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Network.of(Two(), (torch.randn(1, 8), torch.randn(1, 8)))
    formats = {n: compressed(net, n, EIGHT) for n in ("a.weight", "b.weight")}
    edges = {n: Edge(0.03, 128) for n in ("x", "y", "linear", "sigmoid", "mul", "linear_1", "add")}
    q = Quantized(net, formats, edges)
    path = written(q, tmp_path)
    assert set(onnxruntime.check(path)["outputs"]) == {"output_0", "output_1"}
    x, y = torch.randn(6, 8), torch.randn(6, 8)
    found = onnxruntime.run(path, (x, y))
    from lighten.simulate import Simulation

    for mine, want in zip(found, Simulation(q)(x, y), strict=True):
        assert ((mine - want).abs() / 0.03).max() < 1.01


def test_a_batch_norm_that_onnx_would_fold_away_is_named(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    module[1].running_var.fill_(4)
    net = Network.of(module, torch.randn(2, 3, 5, 5))
    q = Quantized(net, {"0.weight": compressed(net, "0.weight", EIGHT)}, {})
    with pytest.raises(BadOutput, match="fold batch norms"):
        written(q, tmp_path)
    assert torch.allclose(
        onnxruntime.run(written(net, tmp_path), net.inputs[0])[0], net(*net.inputs), atol=1e-5
    )


class Fixed(nn.Module):
    """Knows its batch size."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == 3 else x + 1


class Sorting(nn.Module):
    """Uses an operator that ONNX lacks."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.modified_bessel_i0(x)


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    net = network()
    whole = quantized(net)
    head = compressed(net, "head.weight", EIGHT)
    cases = [
        (replace(whole, edges={"nowhere": Edge(0.1, 0)}), BadOutput, "nowhere"),
        (replace(whole, edges={"x": Edge(0.0, 0)}), BadOutput, "scale"),
        (replace(whole, edges={"x": Edge(0.1, 300)}), BadOutput, "zero 300"),
        (replace(whole, edges={"x": Edge(0.1, 0, 24)}), WrongUse, "24 bits"),
        (replace(whole, weights={"gone.weight": head}), BadOutput, "gone.weight"),
        (replace(whole, weights={"head.weight": compressed(net, "head.weight", "int8_channel")}),
         WrongUse, "int8_channel"),
        (replace(whole, weights={"stem.weight": compressed(net, "stem.weight", "f16")}),
         WrongUse, "f16"),
        (network(Sorting), BadInput, "Sorting"),
        (Network.of(nn.Linear(3, 3).double(), torch.zeros(1, 3).double()), WrongUse, "float64"),
    ]  # fmt: skip
    for subject, kind, words in cases:
        with pytest.raises(kind, match=words):
            written(subject, tmp_path)
    assert not list(tmp_path.iterdir())
