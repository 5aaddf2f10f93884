"""MatMulNBits against onnxruntime: the same bytes, and the numbers of `dense()`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lighten.errors import WrongUse
from lighten.quantized import Edge, Quantized
from lighten.registry import exporters
from lighten.runtimes import onnxruntime
from onnx_networks import Residual, Tokens, compressed, network, values

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

FORMATS = [f"int{bits}_g{group}{sym}" for bits in (4, 8) for group in (32, 64, 128)
           for sym in ("", "_sym")]  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_equals_torch_with_dense_weights(format: str, tmp_path: Path) -> None:
    import onnx

    net = network(Tokens, (2, 7, 64))
    names = ["down.weight"] if "128" in format else [layer.name for layer in net.layers]
    q = Quantized(net, {name: compressed(net, name, format) for name in names}, {})
    path = tmp_path / "net.onnx"
    exporters["onnx"].write(q, path)
    assert onnxruntime.operators(path)["MatMulNBits"] == (2 if "128" in format else 5)
    x = torch.randn(3, 7, 64)
    [found] = onnxruntime.run(path, x)
    assert torch.allclose(found, values(net, x, q)["output"], atol=1e-5)
    read = exporters["onnx"].read(path)
    tensors = {t.name: t for t in onnx.load(path).graph.initializer}
    for name, weight in q.weights.items():
        assert torch.equal(read[name], weight.dense())
        assert tensors[f"{name}/codes"].raw_data == weight.parts["codes"].numpy().tobytes()


def test_quantized_inputs_and_grouped_weights(tmp_path: Path) -> None:
    net = network(Tokens, (2, 7, 64))
    weights = {layer.name: compressed(net, layer.name, "int8_g32") for layer in net.layers}
    q = Quantized(net, weights, {"x": Edge(0.03, 120), "add": Edge(0.04, 128)})
    path = tmp_path / "net.onnx"
    exporters["onnx"].write(q, path)
    x = torch.randn(2, 7, 64)
    [found] = onnxruntime.run(path, x)
    assert torch.allclose(found, values(net, x, q)["output"], atol=2e-2)


def test_groups_along_the_row_are_for_linears(tmp_path: Path) -> None:
    net = network(Residual)
    q = Quantized(net, {"down.weight": compressed(net, "down.weight", "int8_g32")}, {})
    with pytest.raises(WrongUse, match=r"down\.weight"):
        exporters["onnx"].write(q, tmp_path / "net.onnx")
