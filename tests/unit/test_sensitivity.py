"""Sensitivities against autograd through the whole model, and against KL divergence as measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import FAMILIES
from lighten.calibrate import Stream
from lighten.candidates import candidates
from lighten.model import Model, open_model
from lighten.registry import formats
from lighten.sensitivity import sensitivities
from lighten.types import Layer, Spec, Stats

BATCH = 4
SEED = 7
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def model(family: str, tiny: Callable[..., Path]) -> Model:
    # larger numbers than a random model's, so that its next tokens are not all alike
    return open_model(tiny(family, initializer_range=0.3))


def windows(model: Model, count: int = 6, length: int = 24) -> Tensor:
    """Tokens without the special ones: the padding's embedding is all zeros, and after a norm no
    first order tells what becomes of it."""
    g = torch.Generator().manual_seed(3)
    return torch.randint(3, model.config.vocab_size, (count, length), generator=g)


def found(model: Model, ids: Tensor) -> dict[str, tuple[Layer, Stats]]:
    pairs = sensitivities(Stream(model, ids, batch=BATCH), SEED)
    return {layer.name: (layer, stats) for layer, stats in pairs}


def by_autograd(model: Model, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Mean square gradients of -log p(drawn token), mean input products, mean p (1 - p)."""
    from transformers import AutoModelForCausalLM

    whole: Any = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(SEED)
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    squares: dict[str, list[Tensor]] = {}
    products: dict[str, list[Tensor]] = {}
    spread = []

    def watch(name: str, args: tuple[Tensor, ...], out: Tensor) -> None:
        out.retain_grad()
        outputs[name], inputs[name] = out, args[0]

    for layer in model.layers:
        whole.get_submodule(layer.name.rpartition(".")[0]).register_forward_hook(
            lambda _, args, out, name=layer.name: watch(name, args, out)
        )
    for start in range(0, len(ids), BATCH):
        logits = whole(input_ids=ids[start : start + BATCH], use_cache=False).logits
        p = logits.detach().flatten(0, 1).softmax(-1)
        spread.append(p * (1 - p))
        drawn = torch.multinomial(p, 1, generator=generator)
        (-logits.flatten(0, 1).log_softmax(-1).gather(1, drawn).sum()).backward()
        for name, out in outputs.items():
            assert out.grad is not None
            module = whole.get_submodule(name.rpartition(".")[0])
            g = out.grad.flatten(0, -2) * float(getattr(module, "embed_scale", 1.0))  # Gemma's
            squares.setdefault(name, []).append(g.square())
            x = inputs[name]
            if x.is_floating_point():
                x = x.detach().flatten(0, -2)
                products.setdefault(name, []).append(x[:, :, None] * x[:, None])
    mean = {name: torch.cat(parts).mean(0) for name, parts in squares.items()}
    return mean, {k: torch.cat(v).mean(0) for k, v in products.items()}, torch.cat(spread).mean(0)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-3 * b.abs().max())


@each_family
def test_gradients_are_those_of_the_whole_model(model: Model) -> None:
    ids = windows(model)
    ours = found(model, ids)
    squares, products, spread = by_autograd(model, ids)
    assert list(ours) == sorted(ours, key=lambda n: ours[n][0].block is None)  # outer ones last
    assert set(ours) == {layer.name for layer in model.layers}
    # Gemma multiplies what it looks up by the root of the width
    scale = model.config.hidden_size**0.5 if model.family == "gemma3_text" else 1.0
    # a window's positions are looked up once for all windows: autograd sums over the batch there
    looked_up = next(n for n, (layer, _) in ours.items() if layer.kind.startswith("embedding"))
    for name, (layer, stats) in ours.items():
        assert stats.n == ids.numel()
        if layer.block is not None:
            assert stats.gradient is not None
            assert close(stats.gradient, squares[name]), name
            assert close(stats.hessian, products[name]), name
        elif layer.kind == "head":
            assert stats.gradient is not None
            assert close(stats.gradient, spread)
            assert close(stats.hessian, products[name])
        elif layer.kind in ("embedding", "positions"):
            assert stats.frequency is not None
            assert close(stats.hessian, torch.diag(squares[looked_up] * scale**2)), name
            assert float(stats.frequency.sum()) == pytest.approx(1)
            if layer.kind == "embedding":
                for token in (0, int(ids[1, 2]), int(ids[-1, -1])):
                    share = (ids == token).float().mean()
                    assert float(stats.frequency[token]) == pytest.approx(float(share))


@torch.no_grad()
def divergence(model: Model, ids: Tensor, changed: dict[str, Tensor]) -> float:
    """Mean KL divergence in nats of the model with other weights from the model as it is."""

    def logs(weights: dict[str, Tensor]) -> Tensor:
        stream = Stream(model, ids, weights=weights).through()
        weight, bias = stream.head
        z = torch.stack(list(stream.outputs())).double() @ weight.double().T
        return (z if bias is None else z + bias).log_softmax(-1)

    p, q = logs({}), logs(changed)
    return float((p.exp() * (p - q)).sum(-1).mean())


def predicted(stats: Stats, delta: Tensor) -> float:
    """Half the sum over rows of what each one's error costs: the formula of lighten.sensitivity."""
    minds = stats.gradient if stats.gradient is not None else stats.frequency
    assert minds is not None
    return 0.5 * float((((delta @ stats.hessian) * delta).sum(1) * minds).sum())


@each_family
def test_predicted_nats_are_measured(model: Model) -> None:
    """A little noise on one weight: the KL divergence that was predicted, within a factor."""
    ids = windows(model, 16, 32)
    ours = found(model, ids)
    ratios = {}
    for i, (name, (layer, stats)) in enumerate(ours.items()):
        w = model.weight(layer)
        g = torch.Generator().manual_seed(i)
        delta = 0.01 * w.std() * torch.randn(w.shape, generator=g)
        measured = divergence(model, ids, {name: w + delta})
        ratios[name] = predicted(stats, delta) / measured
    assert all(1 / 3 < r < 3 for r in ratios.values()), ratios
    mean = torch.tensor(list(ratios.values())).log().mean().exp()
    assert 0.8 < mean < 1.25


@pytest.mark.parametrize("family", ["llama"])
def test_candidates_predict_what_rounding_costs(model: Model) -> None:
    """The whole way: a format, its predicted nats, and those measured after rounding to nearest."""
    ids = windows(model, 16, 32)
    for layer, stats in found(model, ids).values():
        w = model.weight(layer)
        (row,) = candidates(layer, w, stats, [Spec(format="q4_0")], {"q4_0": 1})
        fmt = formats["q4_0"]
        grid = fmt.fit(w, stats.hessian.diagonal())
        measured = divergence(model, ids, {layer.name: fmt.decode(fmt.encode(w, grid), grid)})
        assert 1 / 4 < row.error / measured < 2, layer.name


def test_the_seed_draws_the_tokens(tiny: Callable[..., Path]) -> None:
    model = open_model(tiny("llama"))
    ids = windows(model, 2)

    def gradients(seed: int) -> list[Tensor]:
        return [
            s.gradient for _, s in sensitivities(Stream(model, ids), seed) if s.gradient is not None
        ]

    first, again, other = gradients(0), gradients(0), gradients(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_ticks_and_memory(tiny: Callable[..., Path]) -> None:
    model = open_model(tiny("llama"))
    ticks: list[None] = []
    stream = Stream(model, windows(model, 2))
    for _ in sensitivities(stream, 0, lambda: ticks.append(None)):
        held = {
            n.partition(".block.")[0] for n, p in stream.module.named_parameters() if not p.is_meta
        }
        assert sum(".layers." in n for n in held) <= 1
    assert len(ticks) == 2 * len(model.blocks) + 1
