"""Gemma 3, the text model: norms scale by 1 + w, which GGUF stores; windows on most layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lighten.errors import BadInput
from lighten.families import decoder, rope
from lighten.families.naming import Entry, Family
from lighten.registry import families

_SLIDING, _FULL = "sliding_attention", "full_attention"
_EVERY = 6  # llama.cpp's default: each sixth layer attends to everything
_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


def _offset(name: str) -> float:
    return 1.0 if name.endswith("norm.weight") else 0.0


def _default_layers(count: int, every: int = _EVERY) -> list[str]:
    return [_FULL if every and i % every == every - 1 else _SLIDING for i in range(count)]


def _metadata(config: Any) -> dict[str, Entry]:
    from gguf import GGUFValueType as T

    out = decoder.metadata("gemma3", config)
    kinds = list(config.layer_types)
    if _SLIDING in kinds:
        base = float(config.rope_parameters[_SLIDING]["rope_theta"])
        out["gemma3.rope.freq_base_swa"] = (base, T.FLOAT32)
        out["gemma3.attention.sliding_window"] = (int(config.sliding_window), T.UINT32)
        if kinds != _default_layers(len(kinds)):
            windows = [kind == _SLIDING for kind in kinds]
            out["gemma3.attention.sliding_window_pattern"] = (windows, T.BOOL)
    if config.final_logit_softcapping:
        cap = float(config.final_logit_softcapping)
        out["gemma3.final_logit_softcapping"] = (cap, T.FLOAT32)
    return out


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    out = decoder.config("gemma3", metadata, tensors)
    count, window = out["num_hidden_layers"], metadata.get("gemma3.attention.sliding_window")
    pattern = metadata.get("gemma3.attention.sliding_window_pattern", _EVERY)
    if not window:
        kinds = [_FULL] * count
    elif isinstance(pattern, int):
        kinds = _default_layers(count, pattern)
    elif isinstance(pattern, list) and len(pattern) == count:
        kinds = [_SLIDING if sliding else _FULL for sliding in pattern]
    else:
        raise BadInput(
            f"`gemma3.attention.sliding_window_pattern` does not name {count} layers",
            "the file is damaged",
        )
    local = float(metadata.get("gemma3.rope.freq_base_swa", 10000.0))
    scalar = _attention_scalar(count, out["hidden_size"], out["num_attention_heads"])
    out |= {
        "layer_types": kinds,
        "sliding_window": window or None,
        "query_pre_attn_scalar": scalar or out["head_dim"],
        "final_logit_softcapping": metadata.get("gemma3.final_logit_softcapping") or None,
        "rope_parameters": {
            _FULL: out["rope_parameters"],
            _SLIDING: {"rope_type": "default", "rope_theta": local},
        },
    }
    return out


def _attention_scalar(layers: int, hidden: int, heads: int) -> int | None:
    """What llama.cpp divides attention by (its square) when that is not the head width: the 27B
    model, which it knows by its 62 layers. *Source:* llama.cpp, models/gemma3.cpp."""
    return hidden // heads if layers == 62 else None


def _refuses(config: Any) -> str | None:
    scalar = _attention_scalar(
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    ) or rope.head_dim(config)
    if config.query_pre_attn_scalar != scalar:
        return f"query_pre_attn_scalar {config.query_pre_attn_scalar} (llama.cpp uses {scalar})"
    for name in ("attention_bias", "attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, name, None):
            return f"{name} = {getattr(config, name)}"
    if rope.parameters(config).get("rope_type", "default") not in ("default", "linear"):
        return f"rope_type `{rope.parameters(config)['rope_type']}`"
    if (config.rope_parameters.get(_SLIDING) or {}).get("rope_type", "default") != "default":
        return "scaled rope on the layers with a sliding window"
    return decoder.refuses(config, act="gelu_pytorch_tanh", factors=False)


families("gemma3_text")(
    Family(
        model_type="gemma3_text",
        gguf_arch="gemma3",
        outer=decoder.OUTER,
        blocks=decoder.BLOCKS,
        scalable=decoder.SCALABLE_LINEARS,
        inner=decoder.INNER + decoder.HEAD_NORMS + _NORMS,
        metadata=_metadata,
        config=_config,
        refuses=_refuses,
        offset=_offset,
    )
)
