"""The small files of a Hugging Face folder: config, generation config, tokenizer."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lighten.containers.output import whole_folder
from lighten.containers.safetensors import Shards
from lighten.errors import BadOutput

_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that a model's folder may have besides its config and its weights."""


def small_files(model: Any, dtype: torch.dtype, **config: Any) -> dict[str, bytes]:
    """Name -> content. dtype: what the weights are loaded as; config: entries to add."""
    source = Path(model.path)
    files: dict[str, bytes] = {}
    if model.kind == "huggingface":
        body = json.loads((source / "config.json").read_text(encoding="utf-8"))
        body.pop("quantization_config", None)
        for name in _COPIED:
            if (source / name).is_file():
                files[name] = (source / name).read_bytes()
    else:
        body = json.loads(model.config.to_json_string(use_diff=False))
        body["architectures"] = body.get("architectures") or _architectures(model.config)
        files |= _tokenizer_files(model.tokenizer)
    # a source may say that its head is tied and yet have one of its own: then that is written
    body["tie_word_embeddings"] = bool(model.config.tie_word_embeddings)
    # older readers know the entry by its old name; a source that says so is followed
    body["torch_dtype" if "torch_dtype" in body else "dtype"] = str(dtype).removeprefix("torch.")
    body |= config
    files["config.json"] = (json.dumps(body, indent=2, sort_keys=True) + "\n").encode()
    return files


def weight_dtype(model: Any) -> torch.dtype:
    """What most weights of the source are stored as; float16 for weights out of a GGUF."""
    if model.kind != "huggingface":
        return torch.float16
    sizes: dict[torch.dtype, int] = {}
    for layer in model.layers:
        dtype = model.tensors[layer.name].dtype
        sizes[dtype] = sizes.get(dtype, 0) + layer.size
    return max(sizes, key=lambda d: (sizes[d], str(d))) if sizes else torch.float32


def nbytes(files: Mapping[str, bytes], shards: Shards) -> int:
    """Bytes of a folder of these files."""
    return sum(len(content) for content in files.values()) + shards.nbytes()


def write_folder(path: Path, files: Mapping[str, bytes], shards: Shards, load: Any) -> None:
    """A whole folder, or none; `load` gives one tensor at a time."""
    with whole_folder(path) as part:
        for name, content in files.items():
            (part / name).write_bytes(content)
        shards.write(part, load)


def finite(name: str, t: Tensor) -> Tensor:
    """The tensor `name` as it is to be stored; raises BadOutput where its type cannot hold it."""
    if t.is_floating_point() and not bool(t.isfinite().all()):
        raise BadOutput(
            f"tensor `{name}` has numbers that {str(t.dtype).removeprefix('torch.')} cannot hold",
            "start from a model in bfloat16 or float32; leave --even-columns out where it is there",
        )
    return t


def _architectures(config: Any) -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    return [] if name is None else [name]


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()}
