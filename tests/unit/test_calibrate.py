"""The stream against the whole transformers model: the same numbers, one block in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import FAMILIES
from lighten.calibrate import Moment, Stream, submodule
from lighten.model import Model, open_model

LENGTH = 40  # beyond the tiny Gemma's sliding window of 16
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def model(family: str, tiny: Callable[..., Path]) -> Model:
    return open_model(tiny(family))


@pytest.fixture
def whole(family: str, tiny: Callable[..., Path]) -> Any:
    """The model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()


def windows(model: Model, count: int = 5, length: int = LENGTH) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (count, length), generator=g)


@torch.no_grad()
def last_hidden(whole: Any, ids: Tensor) -> Tensor:
    hidden: Tensor = whole.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@each_family
@pytest.mark.parametrize("batch", [2, 8])
def test_block_by_block_gives_what_the_whole_model_gives(
    model: Model, whole: Any, batch: int
) -> None:
    ids = windows(model)  # 5 windows: the last batch of 2 is a single one
    stream = Stream(model, ids, batch=batch)
    assert len(stream) == model.config.num_hidden_layers
    states = torch.stack(list(stream.through().outputs()))
    assert close(states, last_hidden(whole, ids))
    weight, bias = stream.head
    with torch.no_grad():
        logits = whole(input_ids=ids).logits
    assert close(states @ weight.T + (0 if bias is None else bias), logits)


@each_family
def test_every_input_of_a_block_is_what_the_whole_model_has_there(model: Model, whole: Any) -> None:
    ids = windows(model)
    seen: dict[str, Tensor] = {}
    for name in model.blocks:
        whole.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.update(
                {name: args[0] if args else kwargs["hidden_states"]}
            ),
            with_kwargs=True,
        )
    last_hidden(whole, ids)
    stream = Stream(model, ids, batch=2)
    ticks: list[int] = []
    for index in stream:
        assert close(stream.hidden, seen[model.blocks[index]])
        stream.advance(index, stream.load(index))
        ticks.append(index)
    assert ticks == list(range(len(model.blocks)))


@each_family
def test_hessians_are_those_of_the_whole_model(model: Model, whole: Any) -> None:
    ids = windows(model)
    inputs: dict[str, Tensor] = {}
    inner = [layer for layer in model.layers if layer.block is not None]
    for layer in inner:
        whole.get_submodule(layer.name.rpartition(".")[0]).register_forward_pre_hook(
            lambda _, args, name=layer.name: inputs.update({name: args[0].flatten(0, 1)})
        )
    last_hidden(whole, ids)
    stream, shared = Stream(model, ids, batch=2), set()
    for index in stream:
        block = stream.load(index)
        stats = stream.stats(index, block)
        mine = [layer for layer in inner if layer.block == index]
        assert set(stats) == {layer.shares for layer in mine}
        for layer in mine:
            x, found = inputs[layer.name].double(), stats[layer.shares]
            expected = x.T @ x / len(x)
            assert found.n == ids.numel()
            assert torch.equal(found.hessian, found.hessian.T)
            assert close(found.hessian.double(), expected)
            shared.add((layer.shares, layer.shares != layer.name))
        stream.advance(index, block)
    # q, k and v share one Hessian, as do gate and up; GPT-2 has them in one matrix
    assert any(other for _, other in shared) == (model.family != "gpt2")


@each_family
def test_other_weights_are_seen_by_all_later_blocks(model: Model, whole: Any) -> None:
    """An embedding given to the stream, and a weight given to one block as it moves on."""
    ids = windows(model, 3)
    given = {}
    for kind in ("embedding", "linear"):
        layer = next(la for la in model.layers if la.kind.startswith(kind))
        noise = torch.randn(layer.shape, generator=torch.Generator().manual_seed(1))
        given[kind] = (layer, model.weight(layer) + 0.2 * noise)
        value = given[kind][1]
        parameter = whole.get_parameter(layer.name)
        parameter.data = value.T.contiguous() if layer.transposed else value.clone()
    embedding, first = given["embedding"], given["linear"]
    assert first[0].block == 0
    stream = Stream(model, ids, weights={embedding[0].name: embedding[1]}, batch=2)
    for index in stream:
        extra = {first[0].name: first[1]} if index == 0 else None
        stream.advance(index, stream.load(index, extra))
    states = torch.stack(list(stream.outputs()))
    whole.tie_weights()
    assert close(states, last_hidden(whole, ids))
    plain = torch.stack(list(Stream(model, ids).through().outputs()))
    assert not close(states, plain, 1e-2)
    weight, _ = stream.head
    with torch.no_grad():
        assert close(states @ weight.T, whole(input_ids=ids).logits)


@each_family
def test_only_one_block_has_memory_at_a_time(model: Model) -> None:
    stream = Stream(model, windows(model, 2))

    def with_memory() -> set[str]:
        named = [*stream.module.named_parameters(), *stream.module.named_buffers()]
        return {name.replace(".block.", ".") for name, t in named if not t.is_meta}

    def blocks(names: set[str]) -> Iterator[str]:
        return (b for b in model.blocks if any(n.startswith(f"{b}.") for n in names))

    assert not list(blocks(with_memory()))
    for index in stream:
        block = stream.load(index)
        assert list(blocks(with_memory())) == [model.blocks[index]]
        stream.stats(index, block)
        stream.advance(index, block)
        assert not list(blocks(with_memory()))
    list(stream.outputs())
    assert not list(blocks(with_memory()))
    own = {n for n, p in stream.module.named_parameters() if p.is_meta}
    assert all(".layers." in n or ".h." in n for n in own)


def test_a_block_can_be_held_and_moved_through_twice(tiny: Callable[..., Path]) -> None:
    model = open_model(tiny("llama"))
    stream = Stream(model, windows(model, 2))
    block = stream.load(0)
    before = stream.hidden.clone()
    stream.advance(0, block, release=False)
    once = stream.hidden.clone()
    stream.hidden.copy_(before)
    stream.advance(0, block)
    assert torch.equal(stream.hidden, once)


@pytest.mark.parametrize("width", [5, 384, 500])
def test_a_moment_is_the_mean_outer_product(width: int) -> None:
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, n, width, generator=g) for n in (3, 7, 1)]
    moment = Moment((5,))
    for part in parts:
        moment.add(part)
    x = torch.cat([p.flatten(0, 1) for p in parts]).double()
    found = moment.stats()
    assert found.n == 22
    assert torch.allclose(found.hessian.double(), x.T @ x / 22, atol=1e-5)
    assert torch.equal(found.hessian, found.hessian.T)
    peaks = x.view(22, -1, 5).abs().amax(-1).square().mean(0) if width % 5 == 0 else None
    assert (found.peaks is None) == (peaks is None)
    if found.peaks is not None and peaks is not None:
        assert torch.allclose(found.peaks[5].double(), peaks, rtol=1e-5)


def test_submodule_names() -> None:
    assert submodule("model.layers.3.mlp.up_proj.weight", "model.layers.3") == "mlp.up_proj"
