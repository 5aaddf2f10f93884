"""Files of models: copies, GGUF files made of folders, and what a model in one must compute."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from lighten.model import Model
from lighten.registry import families

TOKENS = torch.arange(40).remainder(31).view(2, 20)


def reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Model) -> torch.Tensor:
    skeleton = model.skeleton()
    model.fill(skeleton)
    with torch.no_grad():
        return skeleton(input_ids=TOKENS, use_cache=False).logits


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def write_gguf(
    folder: Path, path: Path, only: tuple[str, ...] = (), change: dict[str, Any] | None = None
) -> Path:
    """A GGUF file of a Hugging Face folder, float32, as the families say; no tokenizer.

    only: parts of names that are stored as Q8_0. change: metadata that lie (None: left out).
    """
    import gguf
    from gguf import GGUFValueType, GGUFWriter

    model = reference(folder)
    family = families[model.config.model_type]
    writer = GGUFWriter(path, family.gguf_arch)
    for key, (value, kind) in family.metadata(model.config).items():
        value = (change or {}).get(key.partition(".")[2], value)
        if value is None:
            continue
        if isinstance(value, list):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, kind)
        else:
            writer.add_key_value(key, value, kind)
    flat = {f"{n}.weight" for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    for name, p in model.named_parameters():
        there = family.gguf_name(name, model.config.num_hidden_layers)
        w = p.detach().T.contiguous() if name in flat else p.detach()
        order = family.row_order(name, model.config)
        w = w if order is None else w[order]
        data = (w + family.offset(name)).numpy()
        if any(part in name for part in only):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(there, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(there, data)
    for name, tensor in family.extra_tensors(model.config).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
