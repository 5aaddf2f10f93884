"""lighten.recover of what lighten.quantize made: its integers learn, and are exported as before."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning", reason="learning needs lightning")

import lighten
from lighten.errors import WrongUse
from lighten.learn_quantized import LearnedQuantized
from lighten.network import Network
from lighten.network_quality import compare_outputs, outputs
from lighten.quantized import Quantized
from lighten.simulate import Simulation
from lighten.trainable import trainable


def draw(count: int, seed: int) -> Tensor:
    return 2 * torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


X, HELD = draw(96, 0), draw(64, 1)


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 6))
    with torch.no_grad():
        module[2].weight *= 10
    return Network.of(module, X[:2])


@pytest.fixture(scope="module")
def made(network: Network) -> Quantized:
    """Four bits, steps and biases off by some per cent: there is something to learn back."""
    twin = trainable(lighten.quantize(network, data=X, weights=4, activations=8), "scales")
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in twin.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=g)
    return twin.freeze()


def kld(network: Network, made: Quantized, x: Tensor) -> float:
    found = compare_outputs(outputs(Simulation(made), x), reference=outputs(network, x))
    assert found.kld_mean is not None
    return found.kld_mean.value


def test_integers_learn_and_are_of_the_same_form(
    network: Network, made: Quantized, tmp_path: Path
) -> None:
    before = kld(network, made, HELD)
    found = lighten.recover(
        made, network.module, data=X, held_out=HELD, length="60steps", rate=1e-3,
        folder=tmp_path / "states",
    )  # fmt: skip
    assert isinstance(found, LearnedQuantized)
    assert kld(network, found.quantized, HELD) < 0.85 * before
    assert kld(network, made, HELD) == before  # it is not changed
    assert found.metrics["steps"] == 60
    assert found.metrics["measure"] == "mean_kld"
    assert found.quantized.edges.keys() == made.edges.keys()
    for name, weight in made.weights.items():
        assert found.quantized.weights[name].spec == weight.spec
        assert found.quantized.weights[name].parts["codes"].equal(weight.parts["codes"])
    if all(importlib.util.find_spec(p) for p in ("onnx", "onnxscript", "onnxruntime")):
        for name, quantized in (("before", made), ("after", found.quantized)):
            lighten.write_onnx(quantized, tmp_path / f"{name}.onnx")
        sizes = {(tmp_path / f"{n}.onnx").stat().st_size for n in ("before", "after")}
        assert max(sizes) - min(sizes) < 64


def test_labels_do_not_choose_and_a_usual_length_is_short(
    network: Network, made: Quantized
) -> None:
    data = X[:24], network(X[:24]).argmax(1)
    found = lighten.recover(made, network, data=data, learn_from="logits:1,labels:0.1")
    assert (found.metrics["length"], found.metrics["measure"]) == ("100steps", "mean_kld")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"masks": {"0.weight": torch.ones(32, 8)}}, "masks is for weights that are float"),
        ({"optimizer": "muon"}, "optimizer is for weights that are float"),
        ({"patience": 2}, "patience is for weights that are float"),
        ({"learn_from": "hidden:1"}, "no modules to look at"),
    ],
)
def test_what_integers_cannot_do_is_told(
    network: Network, made: Quantized, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(WrongUse, match=said) as caught:
        lighten.recover(made, network, data=X, length="2steps", **options)
    assert caught.value.hint


def test_outputs_that_are_numbers_are_learned_from() -> None:
    torch.manual_seed(0)
    one = Network.of(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1)), X[:2])
    found = lighten.recover(lighten.quantize(one, data=X), one, data=X, length="20steps")
    assert isinstance(found, LearnedQuantized)
    assert found.metrics["learn_from"] == "outputs:1"
    assert found.metrics["measure"] == "relative_error"
    assert found.metrics["after"] <= found.metrics["before"]


def test_where_a_float_network_is_needed_it_says_what_to_do(
    network: Network, made: Quantized
) -> None:
    with pytest.raises(WrongUse, match="Quantized is no float network") as caught:
        lighten.quantize(made, data=X)
    assert "lighten.recover" in caught.value.hint
    assert 'learn="100steps"' in caught.value.hint
    pruned = lighten.prune(network, budget="0.6 macs", data=X)
    with pytest.raises(WrongUse, match="Pruned is no float network") as caught:
        lighten.quantize(pruned, data=X)
    assert caught.value.hint == "pass its `network`"
    assert len(str(caught.value)) < 200
