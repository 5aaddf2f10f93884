"""GGUF, the file that llama.cpp and its kin open.

From a Hugging Face model: names, hyper-parameters, tokenizer and chat template are written out of
what the family knows. From a GGUF: every field and every tensor that did not change is carried
over byte for byte. Matrices that no format was chosen for are stored as F16 (BF16 where they were),
vectors and position embeddings as F32, which llama.cpp computes them in.

*Source:* llama.cpp, gguf-py (names of fields) and src/llama-model.cpp (types that it expects).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lighten.containers import gguf as container
from lighten.containers import gguf_vocab
from lighten.containers.gguf import Kind, TensorInfo, Typed, pad
from lighten.containers.output import whole_file
from lighten.containers.safetensors import Tensors
from lighten.errors import BadInput, WrongUse
from lighten.gguf_file import read_gguf
from lighten.network import Network
from lighten.quantized import Quantized
from lighten.registry import exporters, families
from lighten.tensors import read_bytes
from lighten.types import Compressed, Layer, Spec

FOLDER = "export a Hugging Face folder instead (`--export huggingface`)"

FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10,
    "q3_k": 12, "q4_k": 15, "q5_k": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30, "bf16": 32,
}  # fmt: skip
"""The formats that GGUF has -> `general.file_type` of a file that is mostly so."""

_F32, _F16, _BF16 = 0, 1, 30
_DTYPES = {_F32: torch.float32, _F16: torch.float16, _BF16: torch.bfloat16}
_POSITIONS = "position_embd.weight"


@dataclass(frozen=True)
class _Layout:
    """All of a file but its numbers. source: GGUF name -> state-dict name."""

    fields: Mapping[str, Any]
    tensors: list[TensorInfo]
    source: Mapping[str, str]
    alignment: int

    def nbytes(self) -> int:
        head = container.header(self.fields, self.tensors, self.alignment)
        return len(head) + sum(pad(t.nbytes, self.alignment) for t in self.tensors)


@dataclass(frozen=True)
class Gguf:
    """The exporter."""

    name: str = "gguf"
    holds: str = "language models"
    suffix: str = ".gguf"

    def refuses(self, model: Any) -> str | None:
        if isinstance(model, Network | Quantized):
            return "it holds language models; networks go to onnx or checkpoint"
        if model.kind == "gguf":
            return None
        if model.family is None:
            kind = getattr(model.config, "model_type", "?")
            return f"lighten does not know what llama.cpp calls the tensors of `{kind}`"
        why: str | None = families[model.family].refuses(model.config)
        return why

    def notes(self, model: Any) -> tuple[str, ...]:
        if model.kind == "gguf" or model.family is None:
            return ()
        about = gguf_vocab.note(model.tokenizer)
        notes: tuple[str, ...] = tuple(families[model.family].notes(model.config))
        return notes + (() if about is None else (about,))

    def accepts(self, spec: Spec, layer: Layer, model: Any) -> str | None:
        if spec.rank is not None or spec.activations is not None:
            return "GGUF has neither low-rank parts nor quantized activations"
        if spec.sparsity is not None:
            return "GGUF stores zeros like other numbers: a sparse weight would be no smaller there"
        if spec.format is None:
            return None
        if spec.format not in FILE_TYPES:
            return f"GGUF has no format {spec.format}"
        block = container.block_layout(_type(spec.format))[0]
        if layer.shape[1] % block:
            return f"{spec.format} stores blocks of {block}; rows have {layer.shape[1]} columns"
        if self._is_positions(model, layer) and spec.format not in ("f16", "f32"):
            return "llama.cpp wants position embeddings as f16 or f32"
        return None

    # -- sizes ---------------------------------------------------------------------------------
    def nbytes(self, model: Any, specs: Mapping[str, Spec]) -> int:
        return _layout(model, specs).nbytes()

    def fixed_bytes(self, model: Any) -> int:
        kept = Spec()
        return _layout(model, {}).nbytes() - sum(
            self.layer_bytes(model, layer, kept) for layer in model.layers
        )

    def layer_bytes(self, model: Any, layer: Layer, spec: Spec) -> int:
        if model.kind == "gguf":
            lazy = model.tensors[layer.name]
            type_ = _type(lazy.stored if spec.format is None else spec.format)
            return pad(TensorInfo(layer.name, layer.shape, type_).nbytes, model.gguf.alignment)
        if spec.format is not None:
            type_ = _type(spec.format)
        elif self._is_positions(model, layer):
            type_ = _F32
        else:
            type_ = _F16  # BF16 is as long
        return pad(TensorInfo(layer.name, layer.shape, type_).nbytes)

    def rounds_inputs(self, model: Any, layer: Layer, spec: Spec) -> int | None:
        # *Source:* llama.cpp, ggml-cpu.c, type_traits_cpu (vec_dot_type of each type)
        format = spec.format
        if format is None:
            format = model.tensors[layer.name].stored.lower() if model.kind == "gguf" else "f16"
        if layer.kind in ("embedding", "positions") or format in ("f16", "bf16", "f32"):
            return None
        return container.block_layout(_type(format))[0]

    def _is_positions(self, model: Any, layer: Layer) -> bool:
        return model.family is not None and _gguf_name(model, layer.name) == _POSITIONS

    # -- bytes ---------------------------------------------------------------------------------
    def write(self, model: Any, weights: Mapping[str, Compressed], path: Path) -> None:
        why = self.refuses(model)
        if why is not None:
            raise WrongUse(f"this model cannot be written as GGUF: {why}", FOLDER)
        if path.suffix != self.suffix:  # whoever opens a file goes by its suffix
            raise WrongUse(f"`{path}` does not end in .gguf", f"write `{path}.gguf`")
        layers = {layer.name: layer for layer in model.layers}
        specs = {}
        for name, weight in weights.items():
            specs[name] = Spec(format=weight.format.name)
            given = replace(specs[name], sparsity=weight.spec.sparsity)
            why = self.accepts(given, layers[name], model)
            if why is not None:
                raise WrongUse(f"layer `{name}` cannot be written into a GGUF: {why}", FOLDER)
        layout = _layout(model, specs)
        extra = {} if model.kind == "gguf" else families[model.family].extra_tensors(model.config)

        def load(info: TensorInfo) -> Tensor:
            name = layout.source.get(info.name)
            if name is not None and name in weights:
                weight = weights[name]
                order = None if model.family is None else _row_order(model, name)
                return (weight if order is None else weight.rows(order)).parts["bytes"]
            if model.kind == "gguf" and name not in model.changed:
                stored = model.gguf.tensors[info.name]
                return read_bytes(stored.at[0], stored.at[1], stored.nbytes)
            if name is None:
                added: Tensor = extra[info.name].to(_DTYPES[info.type])
                return added
            return _dense(model, name, layers.get(name), info)

        with whole_file(path) as part:
            container.write(part, layout.fields, layout.tensors, load, layout.alignment)

    def read(self, path: Path, model: Any) -> Mapping[str, Tensor]:
        file = read_gguf(path)
        there = {name: _gguf_name(model, name) for name in model.tensors}
        turned = {layer.name for layer in model.layers if layer.transposed}

        def load(name: str) -> Tensor:
            t = file.tensors[str(there[name])].load()
            order = _row_order(model, name)
            if order is not None:
                t = t.index_select(0, order.argsort())
            offset = families[model.family].offset(name)
            t = t.float() - offset if offset else t
            return t.T if name in turned else t

        return Tensors((n for n, known in there.items() if known in file.tensors), load)


def _type(format: str) -> int:
    from gguf import GGMLQuantizationType

    return int(GGMLQuantizationType[format.upper()])


def _gguf_name(model: Any, name: str) -> str | None:
    if model.family is None:
        return name
    n_blocks = model.config.num_hidden_layers
    there: str | None = families[model.family].gguf_name(name, n_blocks)
    return there


def _row_order(model: Any, name: str) -> Tensor | None:
    order: Tensor | None = families[model.family].row_order(name, model.config)
    return order


def _dense(model: Any, name: str, layer: Layer | None, info: TensorInfo) -> Tensor:
    """A tensor that no format was chosen for, as `info` announces it."""
    family = families[model.family]
    t: Tensor = model.tensors[name].load()
    if layer is not None and layer.transposed:
        t = t.T
    order = _row_order(model, name)
    if order is not None:
        t = t.index_select(0, order.to(t.device))
    offset = family.offset(name)
    if offset:
        t = t.float() + offset
    stored = t.to(_DTYPES[info.type])
    if stored.dtype is torch.float16 and not bool(stored.isfinite().all()):
        raise WrongUse(
            f"tensor `{name}` has numbers that float16 cannot hold", "choose bf16 or f32 for it"
        )
    return stored


# -- layouts -------------------------------------------------------------------------------------
def _layout(model: Any, specs: Mapping[str, Spec]) -> _Layout:
    chosen = {n: s.format for n, s in specs.items() if s.format is not None}
    marks = {"general.file_type": _file_type(model, chosen), "general.quantization_version": 2}
    types = {name: _type(format) for name, format in chosen.items()}
    if model.kind == "gguf":
        return _carried_over(model, types, marks)
    return _written_out(model, types, marks)


def _file_type(model: Any, chosen: Mapping[str, str]) -> int:
    """`general.file_type`: the format of most weights; the source's where nothing changes."""
    if model.kind == "gguf" and not chosen:
        return int(model.gguf.metadata.get("general.file_type", FILE_TYPES["f16"]))
    sizes: dict[str, int] = {}
    for layer in model.layers:
        kept = model.tensors[layer.name].stored.lower()
        format = chosen.get(layer.name, kept if kept in FILE_TYPES else "f16")
        sizes[format] = sizes.get(format, 0) + layer.size
    return FILE_TYPES[max(sizes, key=lambda f: (sizes[f], f))] if sizes else FILE_TYPES["f16"]


def _carried_over(model: Any, types: Mapping[str, int], marks: Mapping[str, Any]) -> _Layout:
    file = model.gguf
    here = {_gguf_name(model, name): name for name in model.tensors}
    tensors, source = [], {}
    for lazy in file.tensors.values():
        name, type_ = here.get(lazy.name), _type(lazy.stored)
        if name is not None:
            source[lazy.name] = name
            type_ = types.get(name, type_)
        tensors.append(TensorInfo(lazy.name, lazy.shape, type_))
    fields: dict[str, Any] = {}
    for key, value in file.metadata.items():
        kind, element = file.types[key]
        fields[key] = Typed(value, Kind(kind if element is None else element))
    return _Layout({**fields, **marks}, tensors, source, file.alignment)


def _written_out(model: Any, types: Mapping[str, int], marks: Mapping[str, Any]) -> _Layout:
    family, config = families[model.family], model.config
    layers = {layer.name: layer for layer in model.layers}
    tensors, source = [], {}
    for name, lazy in model.tensors.items():
        there = _gguf_name(model, name)
        if there is None:
            raise BadInput(f"`{family.gguf_arch}` in llama.cpp has no tensor `{name}`", FOLDER)
        shape = tuple(layers[name].shape if name in layers else lazy.shape)
        if name in types:
            type_ = types[name]
        elif len(shape) < 2 or there == _POSITIONS:
            type_ = _F32
        else:
            type_ = _BF16 if lazy.dtype is torch.bfloat16 else _F16
        tensors.append(TensorInfo(there, shape, type_))
        source[there] = name
    for there, extra in family.extra_tensors(config).items():
        tensors.append(TensorInfo(there, tuple(extra.shape), _F32))
    fields: dict[str, Any] = {
        "general.architecture": family.gguf_arch,
        "general.type": "model",
        "general.name": Path(model.source).name or model.path.resolve().name,
        **marks,
    }
    for key, (value, kind) in family.metadata(config).items():
        fields[key] = Typed(value, Kind(int(kind)))
    fields |= gguf_vocab.fields(model.tokenizer, config.vocab_size)
    return _Layout(fields, tensors, source, container.ALIGNMENT)


exporters("gguf")(Gguf())
