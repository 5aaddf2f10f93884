"""GPT-2: learned positions, q, k and v in one matrix, weights stored (in, out) by transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lighten.families import decoder
from lighten.families.naming import Entry, Family
from lighten.registry import families

_OUTER = ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head")
_INNER = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def _metadata(config: Any) -> dict[str, Entry]:
    from gguf import GGUFValueType as T

    numbers = {
        "vocab_size": config.vocab_size,
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head,
    }
    out: dict[str, Entry] = {f"gpt2.{k}": (int(v), T.UINT32) for k, v in numbers.items()}
    out["gpt2.attention.layer_norm_epsilon"] = (float(config.layer_norm_epsilon), T.FLOAT32)
    return out


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    hidden = decoder.required(metadata, "gpt2.embedding_length")
    inner = decoder.required(metadata, "gpt2.feed_forward_length")
    return {
        "vocab_size": decoder.vocab_size(tensors),
        "n_positions": decoder.required(metadata, "gpt2.context_length"),
        "n_embd": hidden,
        "n_layer": decoder.block_count(metadata, "gpt2.block_count", tensors),
        "n_inner": None if inner == 4 * hidden else inner,
        "n_head": decoder.required(metadata, "gpt2.attention.head_count"),
        "layer_norm_epsilon": decoder.epsilon(metadata, "gpt2.attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        **decoder.special(metadata, tensors),
    }


def _refuses(config: Any) -> str | None:
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        return f"activation `{config.activation_function}` (llama.cpp computes `gelu_new` here)"
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        return "attention scaled otherwise than by 1/sqrt(head width)"
    return None


families("gpt2")(
    Family(
        model_type="gpt2",
        gguf_arch="gpt2",
        outer=_OUTER,
        blocks="transformer.h",
        inner=_INNER,
        scalable=(("ln_1", ("attn.c_attn",)), ("ln_2", ("mlp.c_fc",))),
        metadata=_metadata,
        config=_config,
        refuses=_refuses,
    )
)
