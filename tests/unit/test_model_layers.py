"""The layers of models, and the filling of their skeletons, whole or block by block."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import FAMILIES
from lighten.errors import WrongUse
from lighten.model import open_model
from model_files import TOKENS, logits, reference


def test_layers_of_llama(tiny: Any) -> None:
    model = open_model(tiny("llama"))
    assert model.blocks == ("model.layers.0", "model.layers.1")
    named = {layer.name: layer for layer in model.layers}
    assert len(named) == 2 + 2 * 7
    assert sum(layer.size for layer in model.layers) + 5 * 64 == model.parameters
    gate = named["model.layers.1.mlp.gate_proj.weight"]
    assert (gate.kind, gate.shape, gate.block, gate.transposed) == ("linear", (96, 64), 1, False)
    groups: dict[str, set[str]] = {}
    for layer in model.layers:
        groups.setdefault(layer.shares, set()).add(layer.name.split(".")[-2])
    assert sorted(map(sorted, groups.values())) == sorted(
        [["embed_tokens"], ["lm_head"]]
        + [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2
    )
    assert model.others == ()


def test_layers_of_gpt2_are_seen_as_out_by_in(tiny: Any) -> None:
    model = open_model(tiny("gpt2"))
    named = {layer.name: layer for layer in model.layers}
    attention = named["transformer.h.0.attn.c_attn.weight"]
    assert (attention.shape, attention.transposed) == ((192, 64), True)
    stored = model.tensors[attention.name].load()
    assert stored.shape == (64, 192)
    assert torch.equal(model.weight(attention), stored.T)
    assert named["transformer.wpe.weight"].kind == "positions"
    assert named["transformer.wte.weight"].kind == "embedding+head"


def test_unknown_architectures_are_opened_without_a_family(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, PhiConfig

    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=1,
        bos_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = open_model(tmp_path)
    assert model.family is None
    with torch.no_grad():
        expected = reference(tmp_path)(input_ids=TOKENS, use_cache=False).logits
    assert torch.equal(logits(model), expected)
    shares = {layer.name.split(".")[-2]: layer.shares for layer in model.layers if layer.block == 0}
    assert len({shares[n] for n in ("q_proj", "k_proj", "v_proj", "fc1")}) == 1  # parallel block
    assert len(set(shares.values())) == 3


def test_stacked_experts_are_reported_not_compressed(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = open_model(tmp_path)
    assert {name.split(".")[-1] for name in model.others} == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_filled_and_emptied_one_at_a_time(tiny: Any, family: str) -> None:
    model = open_model(tiny(family))
    skeleton = model.skeleton()
    model.fill(skeleton, skip=model.blocks)
    inside = tuple(f"{b}." for b in model.blocks)
    everything = dict(skeleton.named_parameters()) | dict(skeleton.named_buffers())
    assert {n for n, t in everything.items() if t.is_meta} == {
        n for n in everything if n.startswith(inside)
    }
    for prefix in model.blocks:
        block = skeleton.get_submodule(prefix)
        model.fill(block, prefix)
        assert not any(t.is_meta for t in [*block.parameters(), *block.buffers()])
    with torch.no_grad():
        got = skeleton(input_ids=TOKENS, use_cache=False).logits
    assert torch.equal(got, logits(model))
    model.empty(skeleton)
    everything = dict(skeleton.named_parameters()) | dict(skeleton.named_buffers())
    assert all(t.is_meta for t in everything.values())
    model.fill(skeleton)
    with torch.no_grad():
        assert torch.equal(skeleton(input_ids=TOKENS, use_cache=False).logits, got)


def test_filling_draws_no_random_numbers(tiny: Any) -> None:
    model = open_model(tiny("gemma3_text"))
    before = torch.random.get_rng_state()
    model.fill(model.skeleton())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_overrides_are_out_by_in(tiny: Any) -> None:
    model = open_model(tiny("gpt2"))
    layer = next(layer for layer in model.layers if layer.transposed)
    new = torch.randn(layer.shape)
    skeleton = model.skeleton()
    model.fill(skeleton, overrides={layer.name: new, "transformer.wte.weight": torch.ones(320, 64)})
    assert torch.equal(skeleton.get_parameter(layer.name), new.T)
    assert bool((skeleton.lm_head.weight == 1).all())
    new.zero_()
    assert bool(skeleton.get_parameter(layer.name).any())  # a copy, not the caller's memory
    with pytest.raises(WrongUse, match="override"):
        model.fill(skeleton, overrides={layer.name: new.T})
