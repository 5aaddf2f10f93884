"""The configuration of a transformers model that says the model's new shape."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lighten.coupling.axes import Couplings, Keep

_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "hidden_dim")
_HEADS = ("num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "n_heads")


def restate(small: nn.Module, couplings: Couplings, keep: Keep) -> str | None:
    """Change the configuration of a cut transformers model so that `from_pretrained` alone builds
    it; returns why not where it cannot say the shape, None where it does or there is none."""
    old: Any = getattr(small, "config", None)
    if not hasattr(old, "to_dict") or not hasattr(small, "save_pretrained"):
        return None
    new = copy.deepcopy(old)
    why = _widths(new, couplings, keep) or _heads(new, couplings, keep)
    if why is not None:
        return why
    why = mismatch(small, new)
    if why is not None:
        return why
    for module in small.modules():
        if getattr(module, "config", None) is old:
            module.config = new
    return None


def mismatch(model: nn.Module, config: Any) -> str | None:
    """Why a transformers model cannot be built from this configuration, or None."""
    try:
        with torch.device("meta"):
            fresh = type(model)(config)
    except Exception as error:  # a configuration may refuse its own numbers in any way
        return f"its configuration cannot say the new shape ({type(error).__name__}: {error})"
    wanted = {k: tuple(t.shape) for k, t in model.state_dict().items()}
    said = {k: tuple(t.shape) for k, t in fresh.state_dict().items()}
    if wanted != said:
        other = next((k for k in wanted if wanted[k] != said.get(k)), "")
        return f"its configuration cannot say the new shape of `{other}`"
    return None


def is_pretrained(model: nn.Module) -> bool:
    """Whether this is a transformers model that its own configuration describes."""
    config: Any = getattr(model, "config", None)
    own = hasattr(config, "to_dict") and hasattr(model, "save_pretrained")
    return own and mismatch(model, config) is None


def _kept(couplings: Couplings, keep: Keep, name: str) -> int:
    return len(keep[name]) if name in keep else couplings[name].width


def _widths(config: Any, couplings: Couplings, keep: Keep) -> str | None:
    for field in _WIDTHS:
        if not hasattr(config, field):
            continue
        value = getattr(config, field)
        if value is None and field == "n_inner":
            value = 4 * config.n_embd
        sizes = {
            _kept(couplings, keep, axis.name)
            for axis in couplings.free
            if axis.kind == "channels" and axis.width == value
        }
        if len(sizes) > 1:
            return f"its configuration has one `{field}` for all layers, and they differ"
        if sizes and sizes != {value}:
            setattr(config, field, sizes.pop())
    return None


def _heads(config: Any, couplings: Couplings, keep: Keep) -> str | None:
    shares = {
        (_kept(couplings, keep, axis.name), axis.width)
        for axis in couplings.free
        if axis.kind == "heads"
    }
    if not shares or all(kept == width for kept, width in shares):
        return None
    if len(shares) > 1:
        return "its configuration has one number of heads for all layers, and they differ"
    kept, width = shares.pop()
    if hasattr(config, "head_dim") and config.head_dim is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    for field in _HEADS:
        value = getattr(config, field, None)
        if isinstance(value, int) and value % width == 0:
            setattr(config, field, value * kept // width)
    return None
