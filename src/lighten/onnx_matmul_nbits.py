"""Weight-only linear layers in ONNX: onnxruntime's operator MatMulNBits.

    B            uint8 (out, groups, group * bits / 8), codes along the row, the first lowest
    scales       float32 (out, groups), here float16 that a Cast widens when the file is opened
    zero_points  uint8 (out, ceil(groups * bits / 8)), packed alike; without: 2^(bits - 1)

Our integer formats with groups have the same bytes, so nothing is rounded again.

*Source:* onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lighten.types import Compressed

_BITS = (4, 8)
_GROUPS = (32, 64, 128)


def fits(weight: Compressed) -> bool:
    """Whether MatMulNBits has the weight's format."""
    format = weight.format
    bits, group = getattr(format, "code_bits", 0), format.block
    return hasattr(format, "symmetric") and bits in _BITS and group in _GROUPS


def matmul_nbits(
    name: str, weight: Compressed, source: str, bias: str, target: str
) -> tuple[list[Any], list[Any], Any]:
    """(nodes on constants, initializers, the MatMulNBits node) for target = source Wᵀ + bias.

    bias: an initializer's name, or "" for none.
    """
    from onnx import TensorProto, helper, numpy_helper

    format: Any = weight.format
    rows, columns = weight.shape
    groups = columns // format.block

    def tensor(part: str, shape: tuple[int, ...], key: str) -> Any:
        value = weight.parts[key].cpu().numpy()
        return numpy_helper.from_array(np.ascontiguousarray(value).reshape(shape), f"{name}/{part}")

    packed = (rows, groups, format.block * format.code_bits // 8)
    tensors = [tensor("codes", packed, "codes"), tensor("scale", (rows, groups), "scale")]
    inputs = [source, f"{name}/codes", f"{name}/scale32"]
    if not format.symmetric:
        tensors.append(tensor("zero", (rows, -1), "zero"))
        inputs.append(f"{name}/zero")
    if bias:
        inputs += [""] * (5 - len(inputs)) + [bias]
    wide = helper.make_node("Cast", [f"{name}/scale"], [f"{name}/scale32"], to=TensorProto.FLOAT)
    node = helper.make_node(
        "MatMulNBits", inputs, [target], domain="com.microsoft",
        K=columns, N=rows, bits=format.code_bits, block_size=format.block,
    )  # fmt: skip
    return [wide], tensors, node


def dense(node: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """(out, in) float32: what a MatMulNBits node of ours multiplies with."""
    a = {x.name: x.i for x in node.attribute}
    codes = _codes(arrays[node.input[1]].reshape(a["N"], -1), a["bits"], a["K"])
    groups = a["K"] // a["block_size"]
    zero: Any = 1 << (a["bits"] - 1)
    if len(node.input) > 3 and node.input[3]:
        zero = _codes(arrays[node.input[3]], a["bits"], groups).astype(np.float32)
        zero = zero.repeat(a["block_size"], 1)
    scale = arrays[node.input[2]].reshape(a["N"], groups).repeat(a["block_size"], 1)
    found: npt.NDArray[Any] = (codes.astype(np.float32) - zero) * scale.astype(np.float32)
    return found


def _codes(packed: npt.NDArray[Any], bits: int, count: int) -> npt.NDArray[Any]:
    if bits == 8:
        return packed[:, :count]
    both = np.stack([packed & 15, packed >> 4], -1)
    return both.reshape(len(packed), -1)[:, :count]
