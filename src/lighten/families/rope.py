"""Rotary position embeddings abroad: row order, scaling parameters, llama3's frequency factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lighten.errors import BadInput
from lighten.families.naming import Entry


def interleave(heads: int, rows: int) -> Tensor:
    """Row order from rotate-halves to rotate-pairs: gguf = hf[order], for q and k of `rows` rows.

    Hugging Face turns dimension i of a head together with i + d/2; llama.cpp's llama graph turns
    2i with 2i + 1. *Source:* `permute` of llama.cpp's conversion of LlamaForCausalLM.
    """
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def q_k_rows(name: str, config: Any) -> Tensor | None:
    """`interleave` for q_proj and k_proj (weights and biases), None elsewhere."""
    module = name.rsplit(".", 2)[-2] if name.count(".") > 1 else ""
    if module == "q_proj":
        return interleave(config.num_attention_heads, config.num_attention_heads * head_dim(config))
    if module == "k_proj":
        return interleave(config.num_key_value_heads, config.num_key_value_heads * head_dim(config))
    return None


def head_dim(config: Any) -> int:
    """Width of one attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def parameters(config: Any) -> dict[str, Any]:
    """The rotary parameters of layers with full attention, as transformers 5 names them."""
    rope = dict(config.rope_parameters or {})
    return dict(rope.get("full_attention") or rope)


def refuses(config: Any, *, factors: bool) -> str | None:
    """Why llama.cpp cannot rotate as this config says; `factors`: its graph takes rope_freqs."""
    rope = parameters(config)
    kind = rope.get("rope_type", "default")
    known = ("default", "linear", "yarn", "llama3") if factors else ("default", "linear", "yarn")
    if kind not in known:
        return f"rope_type `{kind}` has no counterpart in llama.cpp for this architecture"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported"
    if kind == "yarn":
        beta = (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
        if beta != (32, 1):  # llama.cpp reads these keys for other architectures only
            return f"yarn with beta_fast, beta_slow = {beta} (llama.cpp fixes them to (32, 1))"
        if rope.get("truncate", True) is False:
            return "yarn with truncate = false"
    return None


def metadata(arch: str, config: Any) -> dict[str, Entry]:
    """Base frequency and scaling. *Source:* llama.cpp, load_hparams and its context's yarn part.

    llama.cpp multiplies yarn's own 1 + 0.1 ln(factor) by `attn_factor`, so that key holds the
    quotient of what the config asks for and that.
    """
    from gguf import GGUFValueType as T

    rope = parameters(config)
    out: dict[str, Entry] = {
        f"{arch}.rope.dimension_count": (head_dim(config), T.UINT32),
        f"{arch}.rope.freq_base": (float(rope["rope_theta"]), T.FLOAT32),
    }
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        factor = _factor(rope, config)
        out[f"{arch}.rope.scaling.type"] = (kind, T.STRING)
        out[f"{arch}.rope.scaling.factor"] = (factor, T.FLOAT32)
    if kind == "yarn":
        original = int(rope["original_max_position_embeddings"])
        out[f"{arch}.rope.scaling.original_context_length"] = (original, T.UINT32)
        ratio = _yarn_attention(rope, factor) / (1.0 + 0.1 * math.log(factor))
        if abs(ratio - 1.0) > 1e-6:
            out[f"{arch}.rope.scaling.attn_factor"] = (ratio, T.FLOAT32)
    return out


def _factor(rope: Mapping[str, Any], config: Any) -> float:
    """How many times the context was stretched."""
    factor = rope.get("factor")
    if factor is None:
        factor = config.max_position_embeddings / rope["original_max_position_embeddings"]
    return float(factor)


def _yarn_attention(rope: Mapping[str, Any], factor: float) -> float:
    """Factor on cosine and sine. *Source:* YaRN (arXiv 2309.00071), equation 22, and DeepSeek's
    mscale variant as transformers reads it."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    up, down = rope.get("mscale"), rope.get("mscale_all_dim")
    scale = math.log(factor) if factor > 1 else 0.0
    if up and down:
        return float((0.1 * up * scale + 1.0) / (0.1 * down * scale + 1.0))
    return 0.1 * scale + 1.0


def config(arch: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `metadata` and `frequency_factors`: transformers' rope_parameters."""
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(metadata.get(f"{arch}.rope.freq_base", 10000.0)),
    }
    kind = metadata.get(f"{arch}.rope.scaling.type")
    factor = metadata.get(f"{arch}.rope.scaling.factor", metadata.get(f"{arch}.rope.scale_linear"))
    if kind in ("linear", None) and factor is not None and float(factor) != 1.0:
        rope |= {"rope_type": "linear", "factor": float(factor)}
    elif kind == "yarn":
        factor = float(factor or 1.0)
        ratio = float(metadata.get(f"{arch}.rope.scaling.attn_factor", 1.0))
        context = metadata.get(f"{arch}.context_length")
        original = metadata.get(f"{arch}.rope.scaling.original_context_length", context)
        rope |= {"rope_type": "yarn", "factor": factor}
        rope["original_max_position_embeddings"] = original
        if ratio != 1.0:
            rope["attention_factor"] = ratio * (1.0 + 0.1 * math.log(factor))
    elif kind not in ("linear", "none", None):
        raise BadInput(
            f"rope scaling `{kind}` of this GGUF file is not known to lighten",
            "known: none, linear, yarn, and llama3's rope_freqs tensor",
        )
    if "rope_freqs.weight" in tensors:
        factors = tensors["rope_freqs.weight"].load().flatten().float()
        rope |= llama3_parameters(factors, rope["rope_theta"])
    return rope


def frequency_factors(config: Any) -> dict[str, Tensor]:
    """{"rope_freqs.weight": divisors of each frequency} for rope_type llama3, else {}."""
    rope = parameters(config)
    if rope.get("rope_type") != "llama3":
        return {}
    return {"rope_freqs.weight": llama3_factors(rope, head_dim(config))}


def llama3_factors(rope: Mapping[str, Any], dim: int) -> Tensor:
    """(dim / 2,) divisors: 1 for short waves, `factor` for long ones, harmonic between.

    *Source:* Llama 3.1's rope scaling as published with its reference code.
    """
    factor, low, high = (rope[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = _turns(rope["rope_theta"], dim, rope["original_max_position_embeddings"])
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    inverse: Tensor = (1.0 - smooth) / factor + smooth
    return inverse.reciprocal().to(torch.float32)


def _turns(theta: float, dim: int, context: int) -> Tensor:
    """(dim / 2,) full turns that each frequency makes over the context, float64."""
    exponent = -torch.arange(0, dim, 2, dtype=torch.float64) / dim
    frequency: Tensor = torch.tensor(theta, dtype=torch.float64).pow(exponent)
    return frequency * (context / (2 * math.pi))


def llama3_parameters(factors: Tensor, theta: float) -> dict[str, Any]:
    """llama3 parameters that give these divisors, (dim / 2,); raises BadInput if none do.

    Only the ratios of context length to the two thresholds matter, so the length is taken as
    8192; between the thresholds 1/divisor is linear in the turns, which two points determine.
    """
    if bool((factors == 1.0).all()):
        return {}
    found: dict[str, Any] = {"rope_type": "llama3", "factor": float(factors.max())}
    found |= {"original_max_position_embeddings": 8192, "rope_theta": theta}
    turns = _turns(theta, 2 * len(factors), 8192)
    smooth = (1.0 / factors.double() - 1.0 / found["factor"]) / (1.0 - 1.0 / found["factor"])
    between = (smooth > 1e-4) & (smooth < 1.0 - 1e-4)
    guesses = [(1.0, 4.0)]
    if int(between.sum()) >= 2:
        a = torch.stack((turns[between], torch.ones_like(turns[between])), 1)
        slope, shift = torch.linalg.lstsq(a, smooth[between].unsqueeze(1)).solution.flatten()
        low = float(-shift / slope)
        guesses.append((low, low + float(1.0 / slope)))
    for low, high in guesses:
        found |= {"low_freq_factor": round(low, 4), "high_freq_factor": round(high, 4)}
        if found["high_freq_factor"] <= found["low_freq_factor"]:
            continue
        if torch.allclose(llama3_factors(found, 2 * len(factors)), factors, rtol=1e-4):
            return found
    raise BadInput(
        "the rope_freqs tensor of this GGUF file is not of the llama3 kind",
        "open the Hugging Face folder that it was converted from",
    )
