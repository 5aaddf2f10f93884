"""Static quantizers in an ONNX graph: QuantizeLinear and DequantizeLinear where the marks are.

Weights become int8 or int4 initializers with a scale for each channel, biases int32 with the scale
of input times weight, so that onnxruntime and OpenVINO find the patterns that they run as int8.
4-bit weights pass a Cast to int8, which runtimes do once, when they open the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lighten.errors import BadOutput, WrongUse
from lighten.onnx_graph import DOMAIN, mark_name
from lighten.onnx_matmul_nbits import dense as nbits_dense
from lighten.onnx_matmul_nbits import fits, matmul_nbits
from lighten.quantized import Edge, Quantized
from lighten.types import Compressed

Array = npt.NDArray[Any]

_MOVES = {
    "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "Slice", "Split",
    "DepthToSpace", "SpaceToDepth",
}  # fmt: skip
"""Operators whose output holds numbers of their first input, hence on its grid."""


def check(quantized: Quantized) -> None:
    """Raise WrongUse or BadOutput for what ONNX cannot hold, before anything slow is done."""
    source = quantized.network.source
    state = quantized.network.module.state_dict()
    for name, edge in quantized.edges.items():
        _container(name, edge)
    for name, weight in quantized.weights.items():
        if name not in state:
            raise BadOutput(f"{source} has no parameter `{name}`", "name it as in the state dict")
        if not fits(weight):
            _per_channel(name, weight)


def quantize(model: Any, quantized: Quantized) -> None:
    """Put the quantizers of `quantized` in the marks' place and its codes in the weights', in an
    onnx.ModelProto of onnx_graph.marked_model. Raises BadOutput and WrongUse."""
    _Rewriter(model, quantized).run()


@dataclass
class _Rewriter:
    model: Any
    quantized: Quantized
    before: list[Any] = field(default_factory=list)
    """Nodes that depend on initializers only."""
    initializers: dict[str, Any] = field(default_factory=dict)
    grids: dict[str, tuple[str, Edge]] = field(default_factory=dict)
    """Value -> the quantizer that it has passed, and its name."""
    biases: dict[tuple[str, str, float], str] = field(default_factory=dict)

    def run(self) -> None:
        graph = self.model.graph
        self.initializers = {t.name: t for t in graph.initializer}
        weights = self._weights()
        nodes: list[Any] = []
        for name, weight in weights.items():
            if not fits(weight):
                self._dequantized(name, weight)
        for node in graph.node:
            if node.domain == DOMAIN:
                nodes += self._quantizer(node)
                continue
            source = node.input[0] if node.input else ""
            if node.op_type in _MOVES and source in self.grids:
                nodes += self._moved(node, *self.grids[source])
                continue
            weight_name = node.input[1] if len(node.input) > 1 else ""
            if weight_name in weights:
                weight = weights[weight_name]
                if fits(weight):
                    node = self._nbits(node, weight_name, weight)
                elif node.op_type in ("Conv", "Gemm") and source in self.grids:
                    self._bias(node, self.grids[source][1], weight)
            nodes.append(node)
        used = {name for node in (*self.before, *nodes) for name in node.input}
        for name in [n for n in self.initializers if n not in used]:
            del self.initializers[name]
        del graph.node[:], graph.initializer[:]
        graph.node.extend([*self.before, *nodes])
        graph.initializer.extend(self.initializers.values())
        self._domains()

    def _weights(self) -> dict[str, Compressed]:
        """Initializer -> its codes; raises BadOutput where the graph has another weight."""
        from onnx import numpy_helper

        state = self.quantized.network.module.state_dict()
        found: dict[str, Compressed] = {}
        for name, weight in self.quantized.weights.items():
            tied = [n for n, t in state.items() if _same(t, state[name]) and n in self.initializers]
            here = name if name in self.initializers else next(iter(tied), None)
            if here is None:
                raise BadOutput(
                    f"weight `{name}` is not in the ONNX graph of {self.quantized.network.source}",
                    "torch.onnx merged it into another tensor: leave it float",
                )
            there = numpy_helper.to_array(self.initializers[here])
            want = state[name].detach().cpu().numpy()
            if there.shape != want.shape or not np.array_equal(there, want):
                raise BadOutput(
                    f"torch.onnx changed weight `{name}`, as it folds batch norms into weights",
                    "fold batch norms before quantizing",
                )
            found[here] = weight
        return found

    # -- activations ---------------------------------------------------------------------------
    def _quantizer(self, node: Any) -> Iterator[Any]:
        from onnx import helper

        name = mark_name(node)
        edge = self.quantized.edges[name]
        source, target = node.input[0], node.output[0]
        kind, first, last = _container(name, edge)
        earlier = self.grids.get(source)
        self.grids[target] = (name, edge)
        if earlier is not None and earlier[1] == edge:  # rounding twice changes nothing
            self.grids[target] = earlier  # whose scale and zero are in the graph
            yield helper.make_node("Identity", [source], [target])
            return
        if (edge.first, edge.last) != (first, last):
            low, high = np.float32(edge.low), np.float32(edge.high)
            bounds = [self._add(f"{name}/low", low), self._add(f"{name}/high", high)]
            yield helper.make_node("Clip", [source, *bounds], [f"{name}/clipped"])
            source = f"{name}/clipped"
        scale = self._add(f"{name}/scale", np.float32(edge.scale))
        zero = f"{name}/zero"
        self.initializers[zero] = helper.make_tensor(zero, kind, [], [edge.zero])
        yield from _pair(source, [scale, zero], f"{name}/codes", target)

    def _moved(self, node: Any, name: str, edge: Edge) -> Iterator[Any]:
        """A node that moves numbers, in a pair of quantizers of its own where they are 8 bits.

        Without, onnxruntime puts such a pair there itself, and 1.32 gets signed ones wrong.
        """
        self.grids |= dict.fromkeys(node.output, (name, edge))
        yield node
        if edge.bits > 8:
            return
        grid = [f"{name}/scale", f"{name}/zero"]
        for i, target in enumerate(node.output):
            if target:
                node.output[i] = f"{target}/moved"
                yield from _pair(node.output[i], grid, f"{target}/codes", target)

    # -- weights -------------------------------------------------------------------------------
    def _dequantized(self, name: str, weight: Compressed) -> None:
        """Codes and scales of a per-channel weight, in the place of its float initializer."""
        from onnx import TensorProto, helper

        shape = tuple(self.initializers.pop(name).dims)
        codes, scale = levels(name, weight)
        source = f"{name}/codes"
        if getattr(weight.format, "code_bits", 8) > 4:
            self._add(source, codes.reshape(shape))
        else:
            packed = _nibbles(codes.reshape(-1))
            tensor = helper.make_tensor(source, TensorProto.INT4, shape, packed, raw=True)
            self.initializers[source] = tensor
            self.before.append(
                helper.make_node("Cast", [source], [f"{name}/int8"], to=TensorProto.INT8)
            )
            source = f"{name}/int8"
        inputs = [source, self._add(f"{name}/scale", scale)]
        # onnxruntime's QGemm needs the zeros spelt out
        inputs.append(self._add(f"{name}/zero", np.zeros(len(scale), np.int8)))
        self.before.append(helper.make_node("DequantizeLinear", inputs, [name], axis=0))

    def _bias(self, node: Any, edge: Edge, weight: Compressed) -> None:
        """The bias of a node as int32, where it is constant and int32 holds it."""
        from onnx import helper, numpy_helper

        if len(node.input) < 3 or node.input[2] not in self.initializers:
            return
        name, kernel = node.input[2], node.input[1]
        key = (name, kernel, edge.scale)
        if key not in self.biases:
            _, per_channel = levels(kernel, weight)
            scale = np.float32(edge.scale) * per_channel
            value = numpy_helper.to_array(self.initializers[name])
            codes = np.rint(value.astype(np.float64) / scale.astype(np.float64))
            if value.shape != scale.shape or not bool((np.abs(codes) < 2**31).all()):
                return
            mine = name if not any(k[0] == name for k in self.biases) else f"{name}/{node.name}"
            stored = self._add(f"{mine}/int32", codes.astype(np.int32))
            inputs = [stored, self._add(f"{mine}/scale", scale)]
            self.biases[key] = f"{mine}/float"
            self.before.append(
                helper.make_node("DequantizeLinear", inputs, [f"{mine}/float"], axis=0)
            )
        node.input[2] = self.biases[key]

    def _nbits(self, node: Any, name: str, weight: Compressed) -> Any:
        if node.op_type != "Gemm":
            raise WrongUse(
                f"`{name}` is {weight.format.name}, and a {node.op_type} has no such weights"
                " in ONNX",
                "groups along the row are for linear layers: use int8_channel_sym",
            )
        bias = node.input[2] if len(node.input) > 2 else ""
        made, tensors, new = matmul_nbits(name, weight, node.input[0], bias, node.output[0])
        self.initializers |= {t.name: t for t in tensors}
        for extra in made:
            if not any(extra.output[0] in other.output for other in self.before):
                self.before.append(extra)
        return new

    def _add(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        self.initializers[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _domains(self) -> None:
        from onnx import helper

        used = {node.domain for node in self.model.graph.node}
        kept = [o for o in self.model.opset_import if o.domain in used]
        if "com.microsoft" in used:
            kept.append(helper.make_opsetid("com.microsoft", 1))
        del self.model.opset_import[:]
        self.model.opset_import.extend(kept)


def levels(name: str, weight: Compressed) -> tuple[Array, Array]:
    """Codes (out, in) int8 and scales (out,) float32 of a symmetric weight per channel.

    A row of zeros gets scale 1: its bias is int32 in units of that scale, and none holds for 0.
    Raises WrongUse for other formats.
    """
    format = _per_channel(name, weight)
    codes, grid = format.unpack(weight.parts, weight.shape)
    signed = codes.to(torch.int16) - format.middle
    scale = grid["scale"][:, 0].float()
    dead = scale == 0
    signed = torch.where(dead[:, None], torch.zeros_like(signed), signed)
    scale = torch.where(dead, torch.ones_like(scale), scale)
    return signed.to(torch.int8).cpu().numpy(), scale.cpu().numpy()


def _pair(source: str, grid: list[str], codes: str, target: str) -> Iterator[Any]:
    from onnx import helper

    yield helper.make_node("QuantizeLinear", [source, *grid], [codes])
    yield helper.make_node("DequantizeLinear", [codes, *grid], [target])


def _nibbles(codes: Array) -> bytes:
    """Two codes of 4 bits a byte, the first in the low bits."""
    low = np.pad(codes, (0, len(codes) % 2)).astype(np.uint8) & 15
    return (low[::2] | low[1::2] << 4).astype(np.uint8).tobytes()


def _per_channel(name: str, weight: Compressed) -> Any:
    """The weight's format, where it is integers with one scale a row and no zero."""
    format = weight.format
    symmetric = getattr(format, "symmetric", False)
    if not (hasattr(format, "code_bits") and symmetric and not format.block):
        raise WrongUse(
            f"`{name}` is {format.name}, which ONNX cannot hold",
            "int8_channel_sym, int7_channel_sym and int4_channel_sym for all layers, int4_g32 to"
            " int8_g128 for linear ones",
        )
    return format


def _container(name: str, edge: Edge) -> tuple[int, int, int]:
    """The ONNX type that holds the codes, its first and its last.

    Not the 4-bit types: onnxruntime 1.32 fuses those into an int8 convolution and refuses its own
    graph; 8 bits after a clip are the same numbers.
    """
    from onnx import TensorProto as T

    if not (np.isfinite(np.float32(edge.scale)) and np.float32(edge.scale) > 0):
        raise BadOutput(f"the quantizer of `{name}` has scale {edge.scale:g}", "it must be > 0")
    if not edge.first <= edge.zero <= edge.last:
        raise BadOutput(
            f"the quantizer of `{name}` has zero {edge.zero}, outside its codes"
            f" {edge.first} to {edge.last}",
            "zero must be a number that the edge can carry: padding is made of it",
        )
    signed = {8: T.INT8, 16: T.INT16}
    unsigned = {8: T.UINT8, 16: T.UINT16}
    for bits, kind in (signed if edge.signed else unsigned).items():
        if edge.bits <= bits:
            first = -(1 << (bits - 1)) if edge.signed else 0
            return kind, first, first + (1 << bits) - 1
    raise WrongUse(f"`{name}` has {edge.bits} bits, and ONNX quantizers end at 16", "leave it out")


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.data_ptr() == b.data_ptr()


def dense(model: Any) -> dict[str, Array]:
    """State-dict name -> the numbers that a graph of ours computes with.

    What a file of ours holds beside parameters has a `/` in its name.
    """
    from onnx import numpy_helper

    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    found = {name: value for name, value in arrays.items() if "/" not in name}
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in arrays:
            kind = {1: np.float32, 3: np.int8}[node.attribute[0].i]
            arrays[node.output[0]] = arrays[node.input[0]].astype(kind)
        if node.op_type == "MatMulNBits":
            found[node.input[1].removesuffix("/codes")] = nbits_dense(node, arrays)
        if node.op_type == "DequantizeLinear" and node.input[0] in arrays:
            codes, scale = arrays[node.input[0]], arrays[node.input[1]]
            scale = scale.reshape(-1, *[1] * (codes.ndim - 1))
            name = node.output[0].removesuffix("/float")
            if "/" not in name:
                found[name] = codes.astype(np.float32) * scale
    return found
