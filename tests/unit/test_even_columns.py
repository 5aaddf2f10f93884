"""Columns made even: the same function, columns of one size, nothing rounded on the way."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import FAMILIES
from lighten.errors import WrongUse
from lighten.even_columns import LARGEST, column_scales, places, refuses, scaled_columns
from lighten.families.rope import head_dim
from lighten.model import Model, open_model
from model_files import logits


@pytest.mark.parametrize(
    ("family", "settings"),
    [*((family, {}) for family in FAMILIES), ("llama", {"mlp_bias": True, "attention_bias": True})],
)
def test_it_is_the_same_function(tiny: Any, family: str, settings: dict[str, Any]) -> None:
    model = open_model(tiny(family, **settings))
    scales = column_scales(model)
    assert all(float(s.max() / s.min()) > 1.01 for s in scales.values())
    torch.testing.assert_close(logits(scaled_columns(model, scales)), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_columns_that_share_a_channel_are_of_one_size(tiny: Any, family: str) -> None:
    model = open_model(tiny(family))
    even = scaled_columns(model, column_scales(model))
    layers = {layer.name: layer for layer in model.layers}

    def spread(of: Model, readers: tuple[str, ...], width: int) -> float:
        w = torch.cat([of.weight(layers[name]) for name in readers])
        if w.shape[1] != width:  # heads of a group read one channel
            wide = head_dim(of.config)
            w = w.view(len(w), width // wide, -1, wide).transpose(1, 2).reshape(-1, width)
        size = w.square().mean(0).sqrt()
        return float(size.max() / size.min())

    for place in places(model):
        width = model.tensors[f"{place.writer}.weight"].shape[0]
        assert spread(model, place.readers, width) > 1.01
        assert spread(even, place.readers, width) < 1.001


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_stay_in_their_type_and_readers_take_the_rest(tiny: Any, dtype: torch.dtype) -> None:
    model = open_model(tiny("llama", dtype=dtype))
    even = scaled_columns(model, column_scales(model))
    norm = "model.layers.0.input_layernorm.weight"
    assert even.tensors[norm].load().dtype == dtype
    assert not torch.equal(even.tensors[norm].load(), model.tensors[norm].load())
    torch.testing.assert_close(logits(even), logits(model), rtol=1e-4, atol=1e-5)


def test_what_is_empty_or_nearly_so_is_not_scaled_without_end(tiny: Any) -> None:
    model = open_model(tiny("llama"))
    down, up = ("model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight")
    weight = model.tensors[down].load()
    weight[:, 0], weight[:, 1] = 0, weight[:, 1] * 1e-6
    norm = "model.layers.0.post_attention_layernorm.weight"
    dead = model.tensors[norm].load()
    dead[3] = 0
    model = model.with_vectors({down: weight, norm: dead})
    scales = column_scales(model)
    assert float(scales[up][0]) == 1
    assert float(scales[up][1]) == LARGEST
    even = scaled_columns(model, scales)
    assert float(even.tensors[norm].load()[3]) == 0
    torch.testing.assert_close(logits(even), logits(model))


def test_weights_on_a_grid_and_strangers_are_refused(tiny: Any) -> None:
    model = open_model(tiny("llama"))
    model.__dict__["kind"] = "gguf"
    assert "lies on a grid" in str(refuses(model))
    with pytest.raises(WrongUse, match="grid"):
        places(model)
    model.__dict__.update(kind="huggingface", family=None)
    assert "no place" in str(refuses(model))


def test_many_dead_columns_leave_the_others_to_be_made_even(tiny: Any) -> None:
    model = open_model(tiny("llama"))
    down = "model.layers.0.mlp.down_proj.weight"
    weight = model.tensors[down].load()
    weight[:, ::2] *= 1e-9
    scales = column_scales(model.with_vectors({down: weight}))
    alive = scales["model.layers.0.mlp.up_proj.weight"][1::2]
    assert float(alive.max()) > 1.01
    assert float(alive.max() / alive.min()) > 1.01
