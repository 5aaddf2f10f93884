"""Quantized networks that learn from the float one: never worse on held-out data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lighten
from lighten.blockwise import held_quarter
from lighten.errors import BadInput, WrongUse
from lighten.learn_quantized import learn_quantized, quantize_and_learn
from lighten.network import Network
from lighten.network_quality import compare_outputs, outputs
from lighten.quantize_network import quantize
from lighten.quantized import Quantized
from lighten.simulate import Simulation
from lighten.trainable import trainable

pytest.importorskip("lightning")


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6),
    )  # fmt: skip
    with torch.no_grad():
        module[-1].weight *= 30
    return Network.of(module, torch.randn(1, 3, 8, 8))


@pytest.fixture(scope="module")
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.nn.functional.interpolate(torch.randn(64, 3, 3, 3), 8, mode="bilinear") * 2


def wrong_steps(made: Quantized) -> Quantized:
    """Steps and biases that are some per cent off, at random."""
    twin = trainable(made, "scales")
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in twin.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=g)
    return twin.freeze()


def divergence(network: Network, made: Quantized, x: Tensor) -> float:
    found = compare_outputs(outputs(Simulation(made), x), reference=outputs(network, x))
    assert found.kld_mean is not None
    return found.kld_mean.value


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("block_steps", [0, 10])
def test_it_gets_nearer_to_the_float_network(
    network: Network, images: Tensor, codes: bool, block_steps: int
) -> None:
    data = images[:40]
    made = wrong_steps(quantize(network, data[~held_quarter(40)], bits_weights=4))
    found = learn_quantized(
        made, network, data, length="40steps", codes=codes, rate=2e-3, block_steps=block_steps
    )
    assert found.metrics["measure"] == "mean_kld"
    assert found.metrics["after"] < 0.7 * found.metrics["before"]
    held = data[held_quarter(40)]
    assert divergence(network, found.quantized, held) == pytest.approx(found.metrics["after"], 1e-3)
    unseen = images[40:]
    assert divergence(network, found.quantized, unseen) < divergence(network, made, unseen)
    assert bool(found.blocks) == bool(block_steps)
    for name, weight in found.quantized.weights.items():
        same = torch.equal(weight.parts["codes"], made.weights[name].parts["codes"])
        assert same or codes


def test_a_rate_that_ruins_it_changes_nothing(network: Network, images: Tensor) -> None:
    made = quantize(network, images[:30], bits_weights=8)
    found = learn_quantized(made, network, images[:40], length="6steps", rate=1.0)
    assert found.metrics["best_step"] == 0
    assert found.metrics["after"] == found.metrics["before"]
    assert torch.equal(Simulation(found.quantized)(images), Simulation(made)(images))


def test_what_was_stopped_goes_on_to_the_same_end(
    network: Network, images: Tensor, tmp_path: Path
) -> None:
    made = wrong_steps(quantize(network, images[:30], bits_weights=4))
    one = learn_quantized(made, network, images[:40], length="10steps", folder=tmp_path / "a")
    two = learn_quantized(made, network, images[:40], length="10steps", folder=tmp_path / "a")
    three = learn_quantized(made, network, images[:40], length="10steps")
    for other in (two, three):
        assert torch.equal(Simulation(other.quantized)(images), Simulation(one.quantized)(images))


def test_held_out_images_are_not_calibrated_on(network: Network, images: Tensor) -> None:
    given = []

    def make(x: Tensor) -> Quantized:
        given.append(x)
        return quantize(network, x)

    quantize_and_learn(network, images[:40], make, length="2steps")
    quantize_and_learn(network, images[:40], make, length="2steps", augment="none")
    seen = images[:40][~held_quarter(40)]
    assert torch.equal(given[0], torch.cat([seen, seen.flip(-1)]))
    assert torch.equal(given[1], seen)


def test_the_public_verb_learns(network: Network, images: Tensor, tmp_path: Path) -> None:
    made = lighten.quantize(network.module, network.inputs, data=images, weights=4, learn="4steps")
    assert {w.spec.solver for w in made.weights.values()} == {"gptq"}
    other = lighten.quantize(network.module, network.inputs, data=images, solver="learned")
    assert {w.spec.solver for w in other.weights.values()} == {"learned"}
    with pytest.raises(WrongUse, match="learn_codes"):
        lighten.quantize(network.module, network.inputs, data=images, learn_codes=True)
    with pytest.raises(BadInput, match="4 examples"):
        lighten.quantize(network.module, network.inputs, data=images[:4], learn="4steps")
