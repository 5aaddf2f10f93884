"""Networks quantized after training: nearer to the float one than rounding alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lighten.edge_sensitivity import sensitivity
from lighten.errors import BadInput, UnknownName, WrongUse
from lighten.network import Network
from lighten.quantize_network import quality, quantize
from lighten.simulate import Simulation


class Block(nn.Module):
    """Expand, depthwise, project, a skip around it, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
        self.body = nn.Sequential(
            nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
            nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
            nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.head = nn.Conv2d(8, 10, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.body(x))


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    module = Block()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.running_mean is not None
            m.running_mean.normal_(0, 0.3)
            nn.init.uniform_(m.weight, 0.3, 3)
    return Network.of(module, torch.randn(1, 3, 12, 12))


@pytest.fixture(scope="module")
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.nn.functional.interpolate(torch.randn(60, 3, 4, 4), 12, mode="bilinear") * 2


def noise(network: Network, images: Tensor, **settings: object) -> float:
    """Decibels on images that the calibration has not seen."""
    made = quantize(network, images[:40], **settings)  # type: ignore[arg-type]
    return quality(made, network, images[40:])


def test_everything_is_quantized_and_close(network: Network, images: Tensor) -> None:
    made = quantize(network, images[:40], reduce_range=False)
    assert set(made.weights) == {layer.name for layer in made.network.layers}
    assert {w.spec.format for w in made.weights.values()} == {"int8_channel_sym"}
    names = {n.name for n in made.network.graph.graph.nodes}
    assert set(made.edges) <= names
    assert not any("batch_norm" in name for name in names)
    assert quality(made, network, images[40:]) > 20


def test_feedback_and_targets_beat_rounding(network: Network, images: Tensor) -> None:
    settings = {"bits_weights": 4, "bits_activations": 8}
    assert noise(network, images, **settings) > noise(network, images, solver="rtn", **settings) + 2


def test_more_bits_are_nearer(network: Network, images: Tensor) -> None:
    found = [
        noise(network, images, bits_weights=w, bits_activations=a)
        for w, a in ((4, 4), (4, 8), (8, 8), (8, None))
    ]
    assert found == sorted(found)


def test_the_same_seed_gives_the_same_network(network: Network, images: Tensor) -> None:
    one, two = quantize(network, images[:20]), quantize(network, images[:20])
    assert one.edges == two.edges
    x = images[40:]
    assert torch.equal(Simulation(one)(x), Simulation(two)(x))


def test_what_is_named_stays_float(network: Network, images: Tensor) -> None:
    made = quantize(network, images[:20], keep_float=["head.weight", "hardtanh"])
    assert "head.weight" not in made.weights
    assert "hardtanh" not in made.edges
    with pytest.raises(WrongUse, match="hed"):
        quantize(network, images[:20], keep_float=["hed.weight"])


def test_a_bar_is_met_by_leaving_the_worst_in_float(network: Network, images: Tensor) -> None:
    held = torch.arange(40) % 5 == 4
    plain = quantize(network, images[:40][~held], bits_weights=4)
    bar = quality(plain, network, images[:40][held]) + 3
    made = quantize(network, images[:40], bits_weights=4, bar=bar)
    left = len(plain.weights) - len(made.weights) + len(plain.edges) - len(made.edges)
    assert 0 < left < len(plain.weights) + len(plain.edges)
    assert quality(made, network, images[:40][held]) >= bar


def test_a_bar_is_met_by_16_bits_before_float(network: Network, images: Tensor) -> None:
    at = torch.arange(40) % 5 == 4
    seen, held = images[:40][~at], images[:40][at]
    bar = quality(quantize(network, seen, bits_activations=4), network, held) + 3
    made = quantize(network, images[:40], bits_activations=4, bar=bar, spare=16)
    floats = quantize(network, images[:40], bits_activations=4, bar=bar)
    assert {edge.bits for edge in made.edges.values()} == {4, 16}
    assert {edge.bits for edge in floats.edges.values()} == {4}
    assert len(floats.edges) < len(made.edges), "an edge of 16 bits is still an edge"
    assert quality(made, network, held) >= bar


def test_what_16_bits_cannot_reach_is_left_float(network: Network, images: Tensor) -> None:
    made = quantize(network, images[:40], bar=110, spare=9)
    assert not made.weights
    assert len(made.edges) < len(quantize(network, images[:40]).edges)
    for settings in ({"spare": 16}, {"spare": 8, "bar": 20.0}, {"spare": 17, "bar": 20.0}):
        with pytest.raises(WrongUse, match=f"{settings['spare']} bits"):
            quantize(network, images[:20], **settings)  # type: ignore[arg-type]


def test_pairs_of_products_fit_16_bits(network: Network, images: Tensor) -> None:
    def largest(**settings: object) -> int:
        made = quantize(network, images[:20], **settings)  # type: ignore[arg-type]
        codes = [
            w.format.unpack(w.parts, w.shape)[0].int() - w.format.middle
            for w in made.weights.values()
        ]
        return max(2 * 255 * int(c.abs().max()) for c in codes)

    assert largest(reduce_range=True) < 2**15 < largest(reduce_range=False)
    assert largest(reduce_range=True, bits_weights=4) == largest(bits_weights=4)


def test_the_processor_decides_where_nothing_is_said(
    network: Network, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def formats(**settings: object) -> set[str | None]:
        made = quantize(network, images[:20], solver="rtn", **settings)  # type: ignore[arg-type]
        return {w.spec.format for w in made.weights.values()}

    monkeypatch.setattr("lighten.quantize_network.saturates", lambda: True)
    assert formats() == {"int7_channel_sym"}
    assert formats(reduce_range=False) == {"int8_channel_sym"}
    assert formats(bits_activations=None) == {"int8_channel_sym"}
    monkeypatch.setattr("lighten.quantize_network.saturates", lambda: False)
    assert formats() == {"int8_channel_sym"}


def test_weights_alone_keep_8_bits_whatever_the_processor(network: Network, images: Tensor) -> None:
    made = quantize(
        network, images[:8], bits_weights=8, bits_activations=None, group=32, reduce_range=True
    )
    assert {weight.format.name[:4] for weight in made.weights.values()} == {"int8"}


def test_absorbed_biases_leave_more_steps(images: Tensor) -> None:
    torch.manual_seed(2)
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3))
    with torch.no_grad():
        module[0].bias += 100  # type: ignore[operator]
    network = Network.of(module, torch.randn(1, 3, 12, 12))
    plain = quantize(network, images[:40])
    absorbed = quantize(network, images[:40], apply=["absorb_bias"])
    assert absorbed.edges["relu"].scale < plain.edges["relu"].scale / 3
    found = [quality(made, network, images[40:]) for made in (plain, absorbed)]
    assert found[1] > found[0] + 3


def test_sensitivity_finds_the_tensor_with_the_least_bits(network: Network, images: Tensor) -> None:
    made = quantize(network, images[:20], solver="rtn")
    costs = sensitivity(made, images[40:48])
    assert set(costs) == set(made.weights) | {n for n in costs if n in made.edges}
    coarse = {**made.edges, "hardtanh": made.edges["hardtanh"].__class__(2.0, 0, 2)}
    made = made.__class__(made.network, made.weights, coarse)
    costs = sensitivity(made, images[40:48])
    assert max(costs, key=lambda name: costs[name]) == "hardtanh"


def test_mistakes_are_named(network: Network, images: Tensor) -> None:
    with pytest.raises(BadInput, match="no calibration data"):
        quantize(network, images[:0])
    with pytest.raises(BadInput, match="NaN"):
        quantize(network, torch.full((2, 3, 12, 12), float("nan")))
    with pytest.raises(WrongUse, match="7 bits"):
        quantize(network, images, bits_weights=7)
    with pytest.raises(WrongUse, match="`median`"):
        quantize(network, images, ranges="median")
    with pytest.raises(UnknownName, match="fold_batchnorms"):
        quantize(network, images, apply=["fold_batchnorms"])
