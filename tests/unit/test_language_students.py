"""Students made from a language model: which blocks stay, which units, and what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lighten.block_importance import shallowest
from lighten.calibrate import Stream
from lighten.errors import WrongUse
from lighten.language_spec import LanguageSpec
from lighten.language_students import make_language_student
from lighten.model import Model, open_model
from lighten.narrow_feed_forward import feed_forwards, write_narrow
from lighten.smaller_model import check_same, write_shallow

Tiny = Callable[..., Path]


def windows(model: Model, count: int = 4, length: int = 24) -> Tensor:
    drawn = torch.Generator().manual_seed(5)
    return torch.randint(int(model.config.vocab_size), (count, length), generator=drawn)


def outputs(model: Model, ids: Tensor) -> Tensor:
    return torch.stack(list(Stream(model, ids).through().outputs()))


def changed(model: Model, **tensors: float) -> Model:
    """The model with all tensors whose name ends so times a factor (`.` is `__`)."""
    ends = {name.replace("__", "."): factor for name, factor in tensors.items()}
    return model.with_vectors(
        {
            name: lazy.load() * factor
            for name, lazy in model.tensors.items()
            for end, factor in ends.items()
            if name.endswith(end)
        }
    )


def test_blocks_that_do_nothing_go_first(tiny: Tiny) -> None:
    model = open_model(tiny("llama", num_hidden_layers=5))
    idle = {f"{i}__{part}__weight": 0.0 for i in (1, 2) for part in ("self_attn__o_proj",
                                                                    "mlp__down_proj")}  # fmt: skip
    model = changed(model, **idle)
    ticks: list[int] = []
    best, other = shallowest(model, windows(model), 3, lambda: ticks.append(1))
    assert best.kept == [0, 3, 4]
    assert best.kld == pytest.approx(0, abs=1e-6)
    assert other.kld > 0.001
    assert len(ticks) == 5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_units_that_do_nothing_go_first_and_nothing_is_lost(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    into, out = {"llama": ("up_proj", "down_proj"), "gpt2": ("c_fc", "c_proj")}[family]
    model = open_model(tiny(family))
    idle = {}
    for name, lazy in model.tensors.items():
        value = lazy.load()
        if f"mlp.{into}" in name:  # every other unit is zero
            value[..., ::2] = value[..., ::2] if family == "llama" else 0.0
            value[::2] = 0.0 if family == "llama" or value.dim() == 1 else value[::2]
            idle[name] = value
    model = model.with_vectors(idle)
    ids = windows(model)
    units = feed_forwards(model)[0].out.shape[1]
    made, expected, count = write_narrow(model, tmp_path / "a", 0.5, ids, multiple=1)
    assert count == -(-units // 64) * 32
    check_same(made, ids[:1], expected, "half width")
    assert torch.allclose(outputs(made, ids), outputs(model, ids), atol=2e-3)
    assert out in feed_forwards(made)[0].out.name


def test_what_goes_is_made_up_for(tiny: Tiny, tmp_path: Path) -> None:
    model = open_model(tiny("llama"))
    ids = windows(model, 16)
    part = feed_forwards(model)[0]
    made, _, count = write_narrow(model, tmp_path / "a", 1 / 3, ids)
    assert count == 32
    stream = Stream(model, ids)
    block = stream.load(0)
    seen: list[Tensor] = []
    block.get_submodule("mlp.down_proj").register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, -2))
    )
    for _, hidden in stream.batches():
        stream.run(0, block, hidden)
    x = torch.cat(seen)
    whole, small = model.weight(part.out), made.weight(part.out)
    rows = model.weight(part.into[0])
    left = made.weight(feed_forwards(made)[0].into[0])
    keep = [int((rows == row).all(1).nonzero()[0]) for row in left]
    wanted = x @ whole.T
    after = (x[:, keep] @ small.T - wanted).norm()
    plain = (x[:, keep] @ whole[:, keep].T - wanted).norm()
    assert after < 0.95 * plain


@pytest.mark.parametrize("spec", ["half depth", "1 layers, half width", "half depth, from scratch"])
def test_the_type_of_the_numbers_and_the_layers_own_kinds_stay(
    tiny: Tiny, tmp_path: Path, spec: str
) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    teacher = open_model(
        tiny("gemma3_text", num_hidden_layers=4, layer_types=kinds, dtype=torch.bfloat16)
    )
    ids, path = windows(teacher), tmp_path / "student"
    notes = make_language_student(teacher, LanguageSpec.parse(spec, 4), ids, path)
    made = open_model(path)
    assert notes
    assert {t.dtype for t in made.tensors.values()} == {torch.bfloat16}
    assert len(made.config.layer_types) == len(made.blocks)
    assert made.tokenizer("a fox").input_ids == teacher.tokenizer("a fox").input_ids
    again = tmp_path / "again"
    make_language_student(teacher, LanguageSpec.parse(spec, 4), ids, again)
    for file in sorted(path.iterdir()):
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_a_model_that_counts_its_layers_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    teacher = open_model(tiny("gpt2", n_layer=4, scale_attn_by_inverse_layer_idx=True))
    ids = windows(teacher)[:1]
    small = write_shallow(teacher, tmp_path / "a", [2])  # scaled as the first, which it was not
    stream = Stream(teacher, ids)
    stream.advance(2, stream.load(2))
    with pytest.raises(WrongUse, match="something else"):
        check_same(small, ids, next(stream.outputs()), "1 of 4 layers")


def test_feed_forward_parts_are_found_where_attention_is_as_wide(tiny: Tiny) -> None:
    model = open_model(tiny("llama", head_dim=24, num_key_value_heads=4))
    assert model.layers[1].shape[0] == 96
    assert all("mlp.down_proj" in part.out.name for part in feed_forwards(model))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5 layers", "its teacher has 4"), ("0 layers", "its teacher has 4"),
        ("2 layers, half depth", "twice"), ("2 layers, wide", "cannot be read"),
    ],
)  # fmt: skip
def test_words_that_cannot_be(text: str, said: str) -> None:
    with pytest.raises(WrongUse, match=said):
        LanguageSpec.parse(text, 4)
