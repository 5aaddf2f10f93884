"""ONNX models of many operators side by side, for timing them all in one session."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lighten.errors import MissingPackage
from lighten.latency_operators import Operator


def probe(operators: Sequence[Operator], int8: bool) -> tuple[Any, list[str]]:
    """(onnx.ModelProto, marks): the nodes of operator i are marks[i] and, where it stays apart, its
    clip marks[i]/clip.

    Each reads an input of its own shape, and its output is averaged: then little has to be copied
    out, and the runtime keeps the layout that it would have inside a network.
    """
    made = _Builder(int8)
    marks = []
    for i, one in enumerate(operators):
        marks.append(f"op{i}")
        made.add(one, marks[-1])
    return made.model(), marks


def stream_probe(elements: Sequence[int], int8: bool) -> tuple[Any, list[str]]:
    """The same of additions of so many elements."""
    made = _Builder(int8)
    marks = []
    for i, count in enumerate(elements):
        marks.append(f"op{i}")
        shape = (1, 64, max(1, count // 64))
        a, b = made.input(shape, f"{i}a"), made.input(shape, f"{i}b")
        made.node("Add", [a, b], marks[-1])
        made.output(made.requantized(marks[-1]), shape, reduce=False)
    return made.model(), marks


class _Builder:
    def __init__(self, int8: bool) -> None:
        try:
            from onnx import TensorProto, helper, numpy_helper
        except ImportError as error:
            raise MissingPackage(
                f"measuring latency needs the package `onnx`: {error}", "pip install lighten[onnx]"
            ) from error
        self.helper, self.numpy_helper, self.types = helper, numpy_helper, TensorProto
        self.int8 = int8
        self.nodes: list[Any] = []
        self.tensors: dict[str, Any] = {}
        self.inputs: dict[str, Any] = {}
        self.outputs: list[Any] = []
        if int8:
            self.constant("scale", np.float32(0.05))
            self.constant("zero", np.uint8(0))

    def add(self, one: Operator, mark: str) -> None:
        if one.kind == "conv":
            x = self.input((1, one.inputs, *one.size), "x")
            shape = (one.outputs, one.inputs // one.groups, *one.kernel)
            given = [x, *self.weights(shape, mark)]
            self.node(
                "Conv", given, mark, group=one.groups, kernel_shape=one.kernel,
                strides=one.stride, pads=one.padding * 2, dilations=one.dilation,
            )  # fmt: skip
        else:
            rows = math.prod(one.size)
            x = self.input((rows, one.inputs), "x")
            given = [x, *self.weights((one.outputs, one.inputs), mark)]
            self.node("Gemm", given, mark, transB=1)
        name = mark
        if one.clip and not self.int8:  # in int8 rounding to the output's range does it
            self.node("Relu", [mark], f"{mark}/clip")
            name = f"{mark}/clip"
        shape = (1, one.outputs, *([1] * len(one.size)))
        if one.kind == "conv":
            self.output(self.requantized(name), shape, reduce=True)
        else:
            self.output(self.requantized(name), (math.prod(one.size), one.outputs), reduce=False)

    def input(self, shape: tuple[int, ...], prefix: str) -> str:
        name = f"{prefix}_{'x'.join(map(str, shape))}"
        if name not in self.inputs:
            kind = self.types.UINT8 if self.int8 else self.types.FLOAT
            self.inputs[name] = self.helper.make_tensor_value_info(name, kind, shape)
            if self.int8:
                self.node("DequantizeLinear", [name, "scale", "zero"], f"{name}/real")
        return f"{name}/real" if self.int8 else name

    def weights(self, shape: tuple[int, ...], mark: str) -> list[str]:
        """Weight and bias; all weights are alike, which no dense kernel looks at."""
        count, outputs = math.prod(shape), shape[0]
        if not self.int8:
            self.constant(f"{mark}/w", np.full(shape, 0.01, np.float32))
            self.constant(f"{mark}/b", np.full(outputs, 0.1, np.float32))
            return [f"{mark}/w", f"{mark}/b"]
        codes = (np.arange(count) % 127 - 63).astype(np.int8)
        self.constant(f"{mark}/wq", codes.reshape(shape))
        self.constant(f"{mark}/ws", np.full(outputs, 0.01, np.float32))
        self.constant(f"{mark}/wz", np.zeros(outputs, np.int8))
        self.constant(f"{mark}/bq", np.ones(outputs, np.int32))
        self.constant(f"{mark}/bs", np.full(outputs, 0.0005, np.float32))
        dequantize = "DequantizeLinear"
        parts = [f"{mark}/wq", f"{mark}/ws", f"{mark}/wz"]
        self.node(dequantize, parts, f"{mark}_w", axis=0)
        self.node(dequantize, [f"{mark}/bq", f"{mark}/bs"], f"{mark}_b", axis=0)
        return [f"{mark}_w", f"{mark}_b"]

    def requantized(self, name: str) -> str:
        if not self.int8:
            return name
        codes, real = f"{name}_codes", f"{name}_real"
        self.node("QuantizeLinear", [name, "scale", "zero"], codes)
        self.node("DequantizeLinear", [codes, "scale", "zero"], real)
        return real

    def output(self, name: str, shape: tuple[int, ...], reduce: bool) -> None:
        if reduce:
            self.node("GlobalAveragePool", [name], f"{name}_mean")
            name = f"{name}_mean"
        if self.int8:
            self.node("QuantizeLinear", [name, "scale", "zero"], f"{name}_out")
            name = f"{name}_out"
        kind = self.types.UINT8 if self.int8 else self.types.FLOAT
        self.outputs.append(self.helper.make_tensor_value_info(name, kind, shape))

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        made = self.helper.make_node(kind, inputs, [output], name=output)
        for key, value in attributes.items():
            made.attribute.append(self.helper.make_attribute(key, value))
        self.nodes.append(made)

    def constant(self, name: str, value: Any) -> None:
        self.tensors[name] = self.numpy_helper.from_array(np.asarray(value), name)

    def model(self) -> Any:
        graph = self.helper.make_graph(
            self.nodes, "probe", list(self.inputs.values()), self.outputs,
            list(self.tensors.values()),
        )  # fmt: skip
        return self.helper.make_model(
            graph, opset_imports=[self.helper.make_opsetid("", 21)], ir_version=10
        )
