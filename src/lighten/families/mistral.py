"""Mistral: a Llama with a sliding window; llama.cpp runs it as a Llama, without the window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lighten.families import decoder, rope
from lighten.families.naming import Entry, Family
from lighten.registry import families

_WINDOW = "llama.attention.sliding_window"


def _metadata(config: Any) -> dict[str, Entry]:
    from gguf import GGUFValueType as T

    # 0 says "none" and still tells a Mistral from a Llama; llama.cpp reads this key in neither
    window = int(config.sliding_window or 0)
    return decoder.metadata("llama", config) | {_WINDOW: (window, T.UINT32)}


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    window = metadata.get(_WINDOW) or None
    return {**decoder.config("llama", metadata, tensors), "sliding_window": window}


def _notes(config: Any) -> tuple[str, ...]:
    window = config.sliding_window
    if not window or window >= config.max_position_embeddings:
        return ()
    return (f"llama.cpp attends past the sliding window of {window} tokens",)


families("mistral")(
    Family(
        model_type="mistral",
        gguf_arch="llama",
        outer=decoder.OUTER,
        blocks=decoder.BLOCKS,
        scalable=decoder.SCALABLE,
        inner=decoder.INNER,
        metadata=_metadata,
        config=_config,
        refuses=lambda config: decoder.refuses(config, act="silu", factors=True),
        notes=_notes,
        claims=lambda metadata: _WINDOW in metadata,
        row_order=rope.q_k_rows,
        extra_tensors=rope.frequency_factors,
    )
)
