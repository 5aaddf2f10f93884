"""Qwen2 and Qwen2.5: biases on q, k, v; rotary halves stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lighten.families import decoder, rope
from lighten.families.naming import Family
from lighten.registry import families


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    out = decoder.config("qwen2", metadata, tensors)
    del out["head_dim"]  # always hidden / heads here, in llama.cpp too
    return out


def _refuses(config: Any) -> str | None:
    width = rope.head_dim(config) * config.num_attention_heads
    if width != config.hidden_size:
        return f"heads {width} wide in a hidden size of {config.hidden_size}"
    return decoder.refuses(config, act="silu", factors=False)


def _notes(config: Any) -> tuple[str, ...]:
    if "sliding_attention" not in (config.layer_types or ()):
        return ()
    return (f"llama.cpp attends past the sliding window of {config.sliding_window} tokens",)


families("qwen2")(
    Family(
        model_type="qwen2",
        gguf_arch="qwen2",
        outer=decoder.OUTER,
        blocks=decoder.BLOCKS,
        scalable=decoder.SCALABLE,
        inner=decoder.INNER,
        metadata=lambda config: decoder.metadata("qwen2", config),
        config=_config,
        refuses=_refuses,
        notes=_notes,
    )
)
