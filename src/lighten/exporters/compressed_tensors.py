"""A Hugging Face folder whose integer weights stay packed: compressed-tensors' pack-quantized.

    weight_packed  int32 (out, ceil(in * bits / 32)), codes bit by bit, the first lowest
    weight_scale   float16 (out, groups)
    weight_shape   int64 (2,)

Only symmetric formats: the layout has zero points too, but transformers 5.23 with
compressed-tensors 0.20 cannot load them (it expects them unpacked, the package writes them packed).

transformers and vLLM load it by way of the package `compressed-tensors`. The runtime multiplies
in the dtype that config.json names. Scales are float16, so that is float16 (float32 where the
source is, and for Gemma 3, whose activations leave float16's range): bfloat16 would round them.

*Source:* compressed-tensors 0.20, compressors/pack_quantized (layout, rounding) and
quantization/quant_config.py (config). 3 bits need that release: older ones pack with gaps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lighten.containers import folder
from lighten.containers.safetensors import (
    SHARD_BYTES,
    Entry,
    Shards,
    Tensors,
)
from lighten.errors import WrongUse
from lighten.network import Network
from lighten.quantized import Quantized
from lighten.registry import exporters, formats
from lighten.tensors import safetensors_folder
from lighten.types import Compressed, Layer, Spec, tensor_bytes

_HINT = "choose an int format for it, or export a dense folder (`--export huggingface`)"


@dataclass(frozen=True)
class CompressedTensors:
    """The exporter. shard_bytes: the most that one file of weights may have."""

    name: str = "compressed_tensors"
    holds: str = "language models"
    suffix: str = ""
    shard_bytes: int = SHARD_BYTES

    def refuses(self, model: Any) -> str | None:
        if isinstance(model, Network | Quantized):
            return "it holds language models; networks go to onnx or checkpoint"
        if any(layer.transposed for layer in model.layers):
            return "compressed-tensors packs nn.Linear; this model's weights are stored (in, out)"
        return None

    def rounds_inputs(self, model: Any, layer: Layer, spec: Spec) -> int | None:
        return None

    def notes(self, model: Any) -> tuple[str, ...]:
        return ("embeddings stay dense; vLLM wants one format for q, k and v, and for gate and up",)

    def accepts(self, spec: Spec, layer: Layer, model: Any) -> str | None:
        if spec.rank is not None or spec.activations is not None:
            return "low-rank parts and quantized activations are not written"
        if spec.sparsity is not None:
            return "pack-quantized stores zeros like other codes: a sparse weight is no smaller"
        if spec.format is None:
            return None
        if not _is_int(spec.format):
            return f"compressed-tensors has no format {spec.format}"
        if spec.format not in _usable():
            if formats[spec.format].code_bits not in _BITS:
                return f"weights are packed at 2, 3, 4 or 8 bits; {spec.format} is for ONNX"
            return f"transformers cannot load packed zero points; choose {spec.format}_sym"
        if layer.kind not in ("linear", "head") or layer.transposed:
            return f"only nn.Linear weights are packed, and this is of kind `{layer.kind}`"
        why: str | None = formats[spec.format].accepts(layer.shape)
        return why

    # -- sizes ---------------------------------------------------------------------------------
    def nbytes(self, model: Any, specs: Mapping[str, Spec]) -> int:
        chosen = {n: s.format for n, s in specs.items() if s.format is not None}
        return folder.nbytes(self._files(model, chosen), self._shards(model, chosen))

    def fixed_bytes(self, model: Any) -> int:
        kept = sum(self.layer_bytes(model, layer, Spec()) for layer in model.layers)
        ignore = sum(_LINE + len(layer.name) for layer in model.layers)
        groups = sum(_LINE + len(json.dumps(_group(f, []), indent=10)) for f in _usable())
        return self.nbytes(model, {}) - kept + ignore + groups + 8 * _LINE

    def layer_bytes(self, model: Any, layer: Layer, spec: Spec) -> int:
        """A little more than exact: the text about a tensor is counted at its longest."""
        entries = list(_entries(model, layer.name, spec.format, layer.shape))
        size = sum(e.nbytes for e in entries)
        if spec.format is not None:
            many = 4 * sum(one.size for one in model.layers) > self.shard_bytes  # then an index
            size += sum((2 if many else 1) * (_LINE + len(e.name)) for e in entries)
            size += _LINE + len(layer.name)
        return size

    def _shards(self, model: Any, chosen: Mapping[str, str]) -> Shards:
        layers = {layer.name: layer for layer in model.layers}
        entries = [
            e
            for name in model.tensors
            for e in _entries(
                model, name, chosen.get(name), layers[name].shape if name in layers else None
            )
        ]
        return Shards.of(entries, self.shard_bytes)

    def _files(self, model: Any, chosen: Mapping[str, str]) -> dict[str, bytes]:
        if not chosen:
            return folder.small_files(model, _dtype(model))
        groups: dict[str, list[str]] = {}
        for layer in model.layers:
            if layer.name in chosen:
                groups.setdefault(chosen[layer.name], []).append(_module(layer.name))
        ignore = [
            _module(layer.name)
            for layer in model.layers
            if layer.name not in chosen and layer.kind in ("linear", "head")
        ]
        config = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {f: _group(f, groups[f]) for f in sorted(groups)},
            "ignore": ignore,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        return folder.small_files(model, _dtype(model), quantization_config=config)

    # -- bytes ---------------------------------------------------------------------------------
    def write(self, model: Any, weights: Mapping[str, Compressed], path: Path) -> None:
        why = self.refuses(model)
        if why is not None:
            raise WrongUse(f"this model cannot be written in packed form: {why}", _HINT)
        layers = {layer.name: layer for layer in model.layers}
        chosen = {name: weight.format.name for name, weight in weights.items()}
        for name, format in chosen.items():
            spec = Spec(format=format, sparsity=weights[name].spec.sparsity)
            why = self.accepts(spec, layers[name], model)
            if why is not None:
                raise WrongUse(f"layer `{name}` cannot be written in packed form: {why}", _HINT)
        packed = {f"{_module(name)}.{part}": (name, part) for name in chosen for part in _PARTS}

        def load(name: str) -> Tensor:
            if name in packed:
                layer, part = packed[name]
                return _part(weights[layer], part)
            kept: Tensor = model.tensors[name].load()
            return folder.finite(name, kept.to(_kept_dtype(model, name)))

        files = self._files(model, chosen)
        folder.write_folder(path, files, self._shards(model, chosen), load)

    def read(self, path: Path, model: Any) -> Mapping[str, Tensor]:
        files = safetensors_folder(path)
        stored = Tensors(files, lambda name: files[name].load())
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        groups = config.get("quantization_config", {}).get("config_groups", {})
        format_of = {t: f for f, group in groups.items() for t in group["targets"]}
        names = {
            f"{module}.weight": module
            for module, _, part in (name.rpartition(".") for name in stored)
            if part == "weight_packed"
        }

        def load(name: str) -> Tensor:
            if name not in names:
                return stored[name]
            module = names[name]
            return _unpacked(stored, module, formats[format_of[module]])

        plain = [n for n in stored if n.rpartition(".")[2] not in _PARTS]
        return Tensors([*plain, *names], load)


_BITS = (2, 3, 4, 8)
_PARTS = ("weight_packed", "weight_scale", "weight_shape")
_LINE = 96
"""At least what JSON says about a tensor or a layer besides its name."""


def _is_int(format: str) -> bool:
    return format.startswith("int") and hasattr(formats[format], "code_bits")


def _usable() -> list[str]:
    return sorted(
        name
        for name in formats
        if _is_int(name) and formats[name].symmetric and formats[name].code_bits in _BITS
    )


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _dtype(model: Any) -> torch.dtype:
    """What the runtime computes in."""
    wide = str(getattr(model.config, "model_type", "")).startswith("gemma")
    source = folder.weight_dtype(model)
    return torch.float32 if wide or source is torch.float32 else torch.float16


def _kept_dtype(model: Any, name: str) -> torch.dtype:
    if model.kind == "gguf":
        return torch.float32 if len(model.tensors[name].shape) < 2 else torch.float16
    dtype: torch.dtype = model.tensors[name].dtype
    return dtype


def _group(format: str, targets: Sequence[str]) -> dict[str, Any]:
    """One config group: the layers that have this format."""
    entry = formats[format]
    weights = {
        "num_bits": entry.code_bits,
        "type": "int",
        "symmetric": entry.symmetric,
        "strategy": "group" if entry.block else "channel",
        "group_size": entry.block or None,
        "dynamic": False,
    }
    group: dict[str, Any] = {"targets": list(targets), "weights": weights}
    return group | {"input_activations": None, "output_activations": None}


def _words(count: int, bits: int) -> int:
    """int32 words that hold so many codes."""
    return (count * bits + 31) // 32


def _entries(
    model: Any, name: str, format: str | None, shape: tuple[int, int] | None
) -> Iterator[Entry]:
    """The tensors that one weight of the source becomes."""
    if format is None or shape is None:
        yield Entry(name, _kept_dtype(model, name), tuple(model.tensors[name].shape))
        return
    entry, (out, columns), module = formats[format], shape, _module(name)
    groups = columns // (entry.block or columns)
    words = _words(columns, entry.code_bits)
    yield Entry(f"{module}.weight_packed", torch.int32, (out, words))
    yield Entry(f"{module}.weight_scale", torch.float16, (out, groups))
    yield Entry(f"{module}.weight_shape", torch.int64, (2,))


def _part(weight: Compressed, part: str) -> Tensor:
    """One of the three tensors. Codes are stored alike; only rows end on whole words here."""
    if part == "weight_packed":
        return _as_words(weight.parts["codes"])
    if part == "weight_scale":
        return weight.parts["scale"].to(torch.float16)
    return torch.tensor(weight.shape, dtype=torch.int64)


def _unpacked(stored: Mapping[str, Tensor], module: str, entry: Any) -> Tensor:
    """(out, in) float32: the weight that the three tensors stand for."""
    out, columns = (int(n) for n in stored[f"{module}.weight_shape"])
    scale = stored[f"{module}.weight_scale"]
    size = (columns * entry.code_bits + 7) // 8
    codes = tensor_bytes(stored[f"{module}.weight_packed"])[:, :size].contiguous()
    codes, grid = entry.unpack({"codes": codes, "scale": scale}, (out, columns))
    dense: Tensor = entry.decode(codes, grid)
    return dense


def _as_words(rows: Tensor) -> Tensor:
    """uint8 (rows, bytes) -> int32 (rows, words), little-endian, the last word filled with 0."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4)).contiguous().view(torch.int32)


exporters("compressed_tensors")(CompressedTensors())
