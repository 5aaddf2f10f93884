"""A Hugging Face folder of dense weights, for tools that quantize or serve by themselves.

Every compressed weight is written as the numbers it stands for, in the source's dtype: the folder
is as large as the model was. Names, config and tokenizer are the source's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lighten.containers import folder
from lighten.containers.safetensors import SHARD_BYTES, Entry, Shards, Tensors
from lighten.network import Network
from lighten.quantized import Quantized
from lighten.registry import exporters
from lighten.tensors import safetensors_folder
from lighten.types import Compressed, Layer, Spec


@dataclass(frozen=True)
class HuggingFace:
    """The exporter. shard_bytes: the most that one file of weights may have."""

    name: str = "huggingface"
    holds: str = "language models"
    suffix: str = ""
    shard_bytes: int = SHARD_BYTES

    def refuses(self, model: Any) -> str | None:
        if isinstance(model, Network | Quantized):
            return "it holds language models; networks go to onnx or checkpoint"
        return None

    def rounds_inputs(self, model: Any, layer: Layer, spec: Spec) -> int | None:
        return None

    def notes(self, model: Any) -> tuple[str, ...]:
        return ("dense weights: the folder is as large as the model was",)

    def accepts(self, spec: Spec, layer: Layer, model: Any) -> str | None:
        return None

    def nbytes(self, model: Any, specs: Mapping[str, Spec]) -> int:
        files = folder.small_files(model, folder.weight_dtype(model))
        return folder.nbytes(files, Shards.of(self._entries(model), self.shard_bytes))

    def fixed_bytes(self, model: Any) -> int:
        layers = sum(self.layer_bytes(model, layer, Spec()) for layer in model.layers)
        return self.nbytes(model, {}) - layers

    def layer_bytes(self, model: Any, layer: Layer, spec: Spec) -> int:
        return layer.size * _stored_dtype(model, layer.name, True).itemsize

    def write(self, model: Any, weights: Mapping[str, Compressed], path: Path) -> None:
        layers = {layer.name: layer for layer in model.layers}
        shards = Shards.of(self._entries(model), self.shard_bytes)

        def load(name: str) -> Tensor:
            dtype = _stored_dtype(model, name, name in layers)
            if name not in weights:
                kept: Tensor = model.tensors[name].load()
                return folder.finite(name, kept.to(dtype))
            dense = weights[name].dense()
            dense = dense.T if layers[name].transposed else dense
            return folder.finite(name, dense.reshape(tuple(model.tensors[name].shape)).to(dtype))

        files = folder.small_files(model, folder.weight_dtype(model))
        folder.write_folder(path, files, shards, load)

    def read(self, path: Path, model: Any) -> Mapping[str, Tensor]:
        stored = safetensors_folder(path)
        return Tensors(stored, lambda name: stored[name].load())

    def _entries(self, model: Any) -> list[Entry]:
        layers = {layer.name for layer in model.layers}
        return [
            Entry(name, _stored_dtype(model, name, name in layers), tuple(lazy.shape))
            for name, lazy in model.tensors.items()
        ]


def _stored_dtype(model: Any, name: str, is_layer: bool) -> torch.dtype:
    if model.kind == "gguf":
        return torch.float16 if is_layer else torch.float32
    dtype: torch.dtype = model.tensors[name].dtype
    return dtype


exporters("huggingface")(HuggingFace())
