"""Qwen3: a norm on every head of q and k, head width of its own, no biases."""

from __future__ import annotations

from typing import Any

from lighten.families import decoder
from lighten.families.naming import Family
from lighten.registry import families


def _refuses(config: Any) -> str | None:
    if getattr(config, "attention_bias", False):
        return "attention_bias = true (llama.cpp's graph has no bias on the output projection)"
    return decoder.refuses(config, act="silu", factors=False)


def _notes(config: Any) -> tuple[str, ...]:
    if "sliding_attention" not in (config.layer_types or ()):
        return ()
    return (f"llama.cpp attends past the sliding window of {config.sliding_window} tokens",)


families("qwen3")(
    Family(
        model_type="qwen3",
        gguf_arch="qwen3",
        outer=decoder.OUTER,
        blocks=decoder.BLOCKS,
        scalable=decoder.SCALABLE,
        inner=decoder.INNER + decoder.HEAD_NORMS,
        metadata=lambda config: decoder.metadata("qwen3", config),
        config=lambda metadata, tensors: decoder.config("qwen3", metadata, tensors),
        refuses=_refuses,
        notes=_notes,
    )
)
