"""ONNX of any network, float or quantized: for onnxruntime, OpenVINO and what else opens it.

Batch dynamic, one file, operators of opset 21; linear weights in groups use onnxruntime's own
MatMulNBits. Biases that int32 cannot hold in units of input scale times weight scale stay float.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lighten.containers.output import whole_file
from lighten.errors import BadInput, BadOutput, MissingPackage, WrongUse
from lighten.network import Network
from lighten.onnx_graph import marked_model
from lighten.onnx_matmul_nbits import fits
from lighten.onnx_qdq import check, dense, quantize
from lighten.quantized import Quantized
from lighten.registry import exporters

_LIMIT = 2**31 - 1
"""protobuf's: a larger model would need files beside it."""


@dataclass(frozen=True)
class Onnx:
    """The exporter."""

    name: str = "onnx"
    holds: str = "networks"
    suffix: str = ".onnx"

    def refuses(self, model: Any) -> str | None:
        if not isinstance(model, Network | Quantized):
            return (
                "ONNX is for networks given as package.module:factory;"
                " language models go to gguf, compressed_tensors or huggingface"
            )
        network = model.network if isinstance(model, Quantized) else model
        for name, t in network.module.state_dict().items():
            if t.is_floating_point() and t.dtype is not torch.float32:
                return f"`{name}` is {str(t.dtype).removeprefix('torch.')}; ONNX is written float32"
        return None

    def write(self, network: Any, path: Path) -> None:
        data = self._bytes(network)
        with whole_file(path) as part:
            part.write_bytes(data)

    def read(self, path: Path) -> Mapping[str, Tensor]:
        return {
            name: torch.from_numpy(value.copy()) for name, value in dense(_loaded(path)).items()
        }

    def nbytes(self, network: Any) -> int:
        return len(self._bytes(network))

    def notes(self, network: Any) -> tuple[str, ...]:
        if not isinstance(network, Quantized):
            return ()
        found = []
        weights, edges = network.weights.values(), network.edges.values()
        bits = {getattr(w.format, "code_bits", 8) for w in weights if not fits(w)}
        if bits & {2, 3}:
            found.append("weights of 2 and 3 bits are stored in 4 bits")
        if 7 in bits:
            found.append("weights of 7 bits are stored in 8 bits")
        if bits & {2, 3, 4}:
            found.append("weights of 4 bits are stored so; the runtime multiplies them as int8")
        if any(fits(w) for w in weights):
            found.append("linear weights in groups use MatMulNBits, which onnxruntime has")
        if any(e.bits != 8 for e in edges):
            found.append("activations of other than 8 bits are rounded so, and multiplied as float")
        if any(e.bits > 8 for e in edges):
            found.append("OpenVINO does not round activations of more than 8 bits")
        return tuple(found)

    def _bytes(self, network: Any) -> bytes:
        why = self.refuses(network)
        if why is not None:
            raise WrongUse(f"this cannot be written as ONNX: {why}")
        if isinstance(network, Quantized):
            check(network)
            model = marked_model(network.network, network.edges)
            quantize(model, network)
        else:
            model = marked_model(network, {})
        size = model.ByteSize()
        if size > _LIMIT:
            raise BadOutput(
                f"the model has {size:,} bytes, and an ONNX file {_LIMIT:,} at most",
                "compress more of its weights",
            )
        data: bytes = model.SerializeToString(deterministic=True)
        return data


def _loaded(path: Path) -> Any:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise MissingPackage(
            f"reading ONNX needs the package `onnx`: {error}", "pip install lighten[onnx]"
        ) from error
    if not path.is_file():
        raise BadInput(f"there is no file `{path}`", "give the path of an .onnx file")
    try:
        return onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise BadInput(f"`{path}` is no ONNX file: {error}", "it may be cut short") from error


exporters("onnx")(Onnx())
