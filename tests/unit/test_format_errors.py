"""What a layer loses in a format: nats, as they are measured when it alone is quantized."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lighten.format_errors import FormatErrors, format_errors
from lighten.mixture import quantize_mixed
from lighten.network import Network
from lighten.simulate import Simulation
from lighten.stepwise import divergence
from lighten.types import Spec
from small_networks import Plain, Residual, images, trained

X = images(96)
NETWORKS = {kind.__name__: Network.of(trained(kind), X[:2]) for kind in (Residual, Plain)}
FORMATS = ["int8_channel_sym", "int4_channel_sym"]


def measured(net: Network, specs: dict[str, Spec]) -> float:
    return float(divergence(net(X), Simulation(quantize_mixed(net, X, specs))(X)))


@pytest.fixture(scope="module", params=sorted(NETWORKS))
def found(request: pytest.FixtureRequest) -> tuple[Network, FormatErrors]:
    net = NETWORKS[request.param]
    ticks: list[int] = []
    errors = format_errors(net, X, FORMATS, tick=ticks.append)
    assert len(ticks) == len(errors.weights) == 4
    return net, errors


def test_fewer_bits_lose_more(found: tuple[Network, FormatErrors]) -> None:
    for each in found[1].weights.values():
        assert 0 <= each[FORMATS[0]] < 0.1 * each[FORMATS[1]]


def test_one_layer_in_4_bits_loses_what_is_told(found: tuple[Network, FormatErrors]) -> None:
    net, errors = found
    for name, each in errors.weights.items():
        nats = measured(net, {name: Spec(FORMATS[1], solver="gptq")})
        assert nats == pytest.approx(each[FORMATS[1]], rel=0.5)


def test_all_layers_in_8_bits_lose_about_the_sum(found: tuple[Network, FormatErrors]) -> None:
    net, errors = found
    total = sum(each[FORMATS[0]] for each in errors.weights.values())
    total += sum(nats for _, nats in errors.edges)
    spec = Spec(FORMATS[0], activations="8", solver="gptq")
    assert measured(net, dict.fromkeys(errors.weights, spec)) == pytest.approx(total, rel=0.5)


def test_weights_alone_round_no_tensor() -> None:
    found = format_errors(NETWORKS["Residual"], X, FORMATS[:1], activations=None)
    assert found.edges == []
    assert set(found.weights["stem.weight"]) == {FORMATS[0]}
