"""Llama and its kin (SmolLM, TinyLlama, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lighten.families import decoder, rope
from lighten.families.naming import Family
from lighten.registry import families


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **decoder.config("llama", metadata, tensors),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


families("llama")(
    Family(
        model_type="llama",
        gguf_arch="llama",
        outer=decoder.OUTER,
        blocks=decoder.BLOCKS,
        scalable=decoder.SCALABLE,
        inner=decoder.INNER,
        metadata=lambda config: decoder.metadata("llama", config),
        config=_config,
        refuses=lambda config: decoder.refuses(config, act="silu", factors=True),
        claims=lambda metadata: "llama.attention.sliding_window" not in metadata,
        row_order=rope.q_k_rows,
        extra_tensors=rope.frequency_factors,
    )
)
