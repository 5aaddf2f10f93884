"""What the Llama-like decoders share: module names, hyper-parameters and their way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lighten.errors import BadInput
from lighten.families import rope
from lighten.families.naming import Entry

OUTER = ("model.embed_tokens", "model.norm", "lm_head")
BLOCKS = "model.layers"
PROJECTIONS = tuple(f"self_attn.{m}_proj" for m in "qkvo") + tuple(
    f"mlp.{m}_proj" for m in ("gate", "up", "down")
)
INNER = ("input_layernorm", "post_attention_layernorm", *PROJECTIONS)
SCALABLE_LINEARS = (
    ("mlp.up_proj", ("mlp.down_proj",)),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
)
SCALABLE = (
    *SCALABLE_LINEARS,
    ("input_layernorm", tuple(f"self_attn.{m}_proj" for m in "qkv")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)
"""Channels that a factor and its inverse cancel in: `up` is multiplied by the gate, values are
added up by attention, neither bends what it is given."""
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def metadata(arch: str, config: Any) -> dict[str, Entry]:
    """Hyper-parameters that every Llama-like graph of llama.cpp reads."""
    from gguf import GGUFValueType as T

    numbers = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": rope.head_dim(config),
        "attention.value_length": rope.head_dim(config),
    }
    out: dict[str, Entry] = {f"{arch}.{k}": (int(v), T.UINT32) for k, v in numbers.items()}
    out[f"{arch}.attention.layer_norm_rms_epsilon"] = (float(config.rms_norm_eps), T.FLOAT32)
    return out | rope.metadata(arch, config)


def config(arch: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `metadata`: keyword arguments of the transformers config."""
    hidden = required(metadata, f"{arch}.embedding_length")
    heads = required(metadata, f"{arch}.attention.head_count")
    width = metadata.get(f"{arch}.attention.key_length", hidden // heads)
    if metadata.get(f"{arch}.attention.value_length", width) != width or width % 2:
        raise BadInput(
            f"heads of this GGUF file are {width} wide for keys and "
            f"{metadata.get(f'{arch}.attention.value_length')} for values",
            "lighten reads models whose heads have one, even width",
        )
    return {
        "vocab_size": vocab_size(tensors),
        "max_position_embeddings": required(metadata, f"{arch}.context_length"),
        "hidden_size": hidden,
        "num_hidden_layers": block_count(metadata, f"{arch}.block_count", tensors),
        "intermediate_size": required(metadata, f"{arch}.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": width,
        "rms_norm_eps": epsilon(metadata, f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope.config(arch, metadata, tensors),
        **special(metadata, tensors),
    }


def special(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Token ids and whether the head is the embedding, for any architecture."""
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    out = {k: metadata.get(f"tokenizer.ggml.{v}_token_id") for k, v in ids.items()}
    return {**out, "tie_word_embeddings": "output.weight" not in tensors}


def vocab_size(tensors: Mapping[str, Any]) -> int:
    """Rows of the embedding: the token list may be shorter."""
    if "token_embd.weight" not in tensors:
        raise BadInput(
            "this GGUF file has no tensor `token_embd.weight`", "is it a language model?"
        )
    return int(tensors["token_embd.weight"].shape[0])


def required(metadata: Mapping[str, Any], key: str) -> int:
    """A positive integer that no model of this architecture lacks; raises BadInput."""
    value = metadata.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadInput(
            f"`{key}` of this GGUF file is {value!r}, not a positive integer",
            "the file is damaged, or its layers differ in size, which lighten cannot read",
        )
    return value


def block_count(metadata: Mapping[str, Any], key: str, tensors: Mapping[str, Any]) -> int:
    """How many blocks: no more than there are tensors, or building them would not end."""
    count = required(metadata, key)
    if count > len(tensors):
        raise BadInput(
            f"`{key}` of this GGUF file is {count}, with {len(tensors)} tensors in all",
            "the file is damaged",
        )
    return count


def epsilon(metadata: Mapping[str, Any], key: str) -> float:
    """A float32 as the decimal that it was written from (1e-05, not 9.999999747378752e-06)."""
    value = metadata.get(key)
    if not isinstance(value, float) or not 0 <= value < 1:
        raise BadInput(
            f"`{key}` of this GGUF file is {value!r}, not a small number", "the file is damaged"
        )
    return float(f"{value:.6g}")


def refuses(config: Any, *, act: str, factors: bool) -> str | None:
    """Why llama.cpp's graph would compute something else than transformers, or None."""
    name = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if name != act:
        return f"activation `{name}` (llama.cpp computes `{act}` here)"
    return rope.refuses(config, factors=factors)
