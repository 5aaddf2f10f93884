"""Facts about architectures: names, row order, offsets and hyper-parameters, there and back."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lighten.errors import BadInput
from lighten.families import rope
from lighten.registry import families

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2")


def skeleton(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def stored(config: Any) -> dict[str, Any]:
    """The GGUF tensors of a model of this config: objects with a shape, as a reader gives them."""
    family, tensors = families[config.model_type], {}
    for name, parameter in skeleton(config).named_parameters():
        there = family.gguf_name(name, config.num_hidden_layers)
        assert there is not None, name
        tensors[there] = SimpleNamespace(shape=tuple(parameter.shape))
    for name, tensor in family.extra_tensors(config).items():
        tensors[name] = SimpleNamespace(shape=tuple(tensor.shape), load=lambda t=tensor: t)
    return tensors


def there_and_back(config: Any) -> Any:
    """The config that comes back from the metadata and tensors that it is written as."""
    family = families[config.model_type]
    metadata = {key: value for key, (value, _) in family.metadata(config).items()}
    back = {f.model_type for f in families.values() if f.gguf_arch == family.gguf_arch}
    assert [f for f in back if families[f].claims(metadata)] == [config.model_type]
    return AutoConfig.for_model(config.model_type, **family.config(metadata, stored(config)))


@pytest.mark.parametrize("name", FAMILIES)
def test_names_cover_the_model_and_invert(tiny: Any, name: str) -> None:
    config = AutoConfig.from_pretrained(tiny(name))
    family, n = families[name], config.num_hidden_layers
    names = [p for p, _ in skeleton(config).named_parameters()]
    there = [family.gguf_name(p, n) for p in names]
    assert None not in there
    assert len(set(there)) == len(there)
    assert [family.hf_name(t, n) for t in there] == names
    assert family.gguf_name("model.layers.99.mlp.up_proj.weight", n) is None
    assert family.hf_name("blk.99.ffn_up.weight", n) is None


def test_names_are_those_of_llama_cpp() -> None:
    """Source: llama.cpp's LLM_TENSOR names."""
    pairs = {
        "llama": ("model.layers.3.post_attention_layernorm.weight", "blk.3.ffn_norm.weight"),
        "qwen2": ("model.layers.0.self_attn.k_proj.bias", "blk.0.attn_k.bias"),
        "qwen3": ("model.layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight"),
        "gemma3_text": (
            "model.layers.1.post_attention_layernorm.weight",
            "blk.1.post_attention_norm.weight",
        ),
        "gpt2": ("transformer.h.2.attn.c_proj.bias", "blk.2.attn_output.bias"),
        "mistral": ("lm_head.weight", "output.weight"),
    }
    for name, (here, there) in pairs.items():
        assert families[name].gguf_name(here, 4) == there
    gemma = families["gemma3_text"]
    norm = "model.layers.1.pre_feedforward_layernorm.weight"
    assert gemma.gguf_name(norm, 4) == "blk.1.ffn_norm.weight"


@pytest.mark.parametrize("name", FAMILIES)
def test_config_survives_the_metadata(tiny: Any, name: str) -> None:
    config = AutoConfig.from_pretrained(tiny(name))
    assert families[name].refuses(config) is None
    back = there_and_back(config)
    ours = {"architectures", "dtype", "transformers_version", "initializer_range", "use_cache"}
    ours |= {"bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path"}
    here, again = config.to_dict(), back.to_dict()
    assert {k: v for k, v in again.items() if k not in ours} == {
        k: v for k, v in here.items() if k not in ours
    }


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 50000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn, attention": {
        "rope_type": "yarn",
        "rope_theta": 50000.0,
        "factor": 4.0,
        "attention_factor": 1.5,
        "original_max_position_embeddings": 32,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3, other thresholds": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 12.0,
        "original_max_position_embeddings": 2048,
    },
}


@pytest.mark.parametrize("case", ROPES)
def test_rope_scaling_survives_the_metadata(tiny: Any, case: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.from_pretrained(tiny("llama"))
    config.head_dim, config.rope_parameters = 64, dict(ROPES[case])
    assert families["llama"].refuses(config) is None
    back = there_and_back(config)
    kind = ROPES[case]["rope_type"]
    assert back.rope_parameters["rope_type"] == kind
    here, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    again, scale_again = ROPE_INIT_FUNCTIONS[kind](back, "cpu")
    torch.testing.assert_close(again, here, rtol=1e-4, atol=0)
    assert scale_again == pytest.approx(scale)


def test_llama3_factors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(head_dim=128, rope_parameters=dict(ROPES["llama3"]))
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-torch.arange(0, 128, 2) / 128)
    factors = families["llama"].extra_tensors(config)["rope_freqs.weight"]
    torch.testing.assert_close(plain / factors, inverse, rtol=1e-4, atol=0)


def test_foreign_rope_factors_are_refused() -> None:
    with pytest.raises(BadInput, match="llama3 kind"):
        rope.llama3_parameters(torch.linspace(1.0, 7.0, 32), 10000.0)
    assert rope.llama3_parameters(torch.ones(32), 10000.0) == {}


def test_yarn_attention_factor_is_relative_to_llama_cpps_own() -> None:
    config = SimpleNamespace(
        rope_parameters={**ROPES["yarn, attention"]}, head_dim=16, max_position_embeddings=128
    )
    value, _ = rope.metadata("llama", config)["llama.rope.scaling.attn_factor"]
    assert value * (1 + 0.1 * math.log(4.0)) == pytest.approx(1.5)
    config.rope_parameters = {**ROPES["yarn"]}
    assert "llama.rope.scaling.attn_factor" not in rope.metadata("llama", config)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_rows_of_q_and_k_turn_in_pairs(tiny: Any, name: str) -> None:
    """Rotating halves, then reordering, equals reordering, then rotating neighbours."""
    config = AutoConfig.from_pretrained(tiny(name))
    family = families[name]
    prefix = "model.layers.0.self_attn."
    for module, heads in (("q_proj", 4), ("k_proj", 2)):
        order = family.row_order(f"{prefix}{module}.weight", config)
        assert order is not None
        assert sorted(order.tolist()) == list(range(heads * 16))
        assert torch.equal(order, family.row_order(f"{prefix}{module}.bias", config))
        x = torch.randn(heads, 16)
        angle = torch.rand(8)
        half = torch.cat((-x[:, 8:], x[:, :8]), 1)
        cos, sin = angle.cos().repeat(2), angle.sin().repeat(2)
        here = (x * cos + half * sin).flatten()[order]
        pairs = torch.view_as_complex(x.flatten()[order].view(heads, 8, 2).contiguous())
        turned = pairs * torch.polar(torch.ones(8), angle)
        torch.testing.assert_close(here, torch.view_as_real(turned).flatten())
    for other in (f"{prefix}v_proj.weight", f"{prefix}o_proj.weight", "lm_head.weight"):
        assert family.row_order(other, config) is None
    assert families["qwen2"].row_order(f"{prefix}q_proj.weight", config) is None


def test_only_gemma_norms_are_offset(tiny: Any) -> None:
    for name in FAMILIES:
        config = AutoConfig.from_pretrained(tiny(name))
        for parameter, _ in skeleton(config).named_parameters():
            norm = name == "gemma3_text" and "norm" in parameter
            assert families[name].offset(parameter) == (1.0 if norm else 0.0)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "gelu"}, "gelu"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0}}, "dynamic"),
    (
        "llama",
        {"rope_parameters": {**ROPES["yarn"], "beta_fast": 16}},
        "beta_fast",
    ),
    ("qwen2", {"rope_parameters": ROPES["llama3"]}, "llama3"),
    ("qwen2", {"num_attention_heads": 2, "head_dim": 8}, "hidden size"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("gemma3_text", {"query_pre_attn_scalar": 99}, "99"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "softcapping"),
    ("gpt2", {"activation_function": "relu"}, "relu"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scaled"),
]


@pytest.mark.parametrize(("name", "change", "said"), REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(
    tiny: Any, name: str, change: dict[str, Any], said: str
) -> None:
    config = AutoConfig.from_pretrained(tiny(name))
    for key, value in change.items():
        setattr(config, key, value)
    assert said in (families[name].refuses(config) or "")


def test_gemma_window_pattern_and_27b_scale(tiny: Any) -> None:
    config = AutoConfig.from_pretrained(tiny("gemma3_text"))
    config.num_hidden_layers = 62
    config.layer_types = (["sliding_attention"] * 5 + ["full_attention"]) * 10 + [
        "sliding_attention"
    ] * 2
    assert "gemma3.attention.sliding_window_pattern" not in families["gemma3_text"].metadata(config)
    assert families["gemma3_text"].refuses(config) is not None  # 32, where llama.cpp takes 64 / 4
    config.query_pre_attn_scalar = 16
    assert families["gemma3_text"].refuses(config) is None
    assert there_and_back(config).query_pre_attn_scalar == 16
    assert there_and_back(config).layer_types == config.layer_types


def test_notes_say_which_window_llama_cpp_forgets(tiny: Any) -> None:
    config = AutoConfig.from_pretrained(tiny("mistral"))
    assert "64 tokens" in families["mistral"].notes(config)[0]
    config.sliding_window = None
    assert families["mistral"].notes(config) == ()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("damage", ["block_count", "embedding_length", "epsilon"])
def test_damaged_metadata_is_refused(tiny: Any, name: str, damage: str) -> None:
    config = AutoConfig.from_pretrained(tiny(name))
    family = families[name]
    metadata = {key: value for key, (value, _) in family.metadata(config).items()}
    (key,) = (k for k in metadata if k.endswith(damage))
    tensors = stored(config)
    for wrong in (None, -1, "x", [1, 2]):
        with pytest.raises(BadInput, match=key):
            family.config({**metadata, key: wrong}, tensors)
    with pytest.raises(BadInput, match="token_embd"):
        family.config(metadata, {})


def test_a_family_is_one_file() -> None:
    folder = Path(rope.__file__).parent
    assert {f"{n}.py" for n in ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2")} <= {
        p.name for p in folder.iterdir()
    }
    assert set(FAMILIES) <= set(families)
