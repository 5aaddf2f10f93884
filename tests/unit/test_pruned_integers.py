"""What was pruned stays pruned when it is quantized, and when its integers learn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

pytest.importorskip("lightning", reason="learning needs lightning")

import lighten
from lighten.learn_quantized import learn_quantized
from lighten.network import Network
from lighten.quantize_network import quality, quantize
from lighten.quantized import Quantized
from lighten.simulate import Simulation
from lighten.trainable import trainable
from small_networks import Plain, images, trained

X = images(96)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pruned() -> Network:
    """Half of each weight zero, without a pattern; a depthwise convolution among them."""
    module = trained(Plain)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter *= parameter.abs() >= parameter.abs().median()
    return Network.of(module, X[:2])


def brought_back(made: Quantized, network: Network) -> int:
    """How many pruned weights are not zero any more."""
    before = dict(made.network.module.named_parameters())
    return sum(
        int((weight.dense()[before[name].reshape(weight.shape) == 0] != 0).sum())
        for name, weight in made.weights.items()
    )


@pytest.mark.parametrize("solver", ["gptq", "learned", "rtn"])
@pytest.mark.parametrize(
    "options",
    [
        {"bits_weights": 8}, {"bits_weights": 4},
        {"bits_weights": 4, "bits_activations": None, "group": 32},
    ],
)  # fmt: skip
def test_zeros_stay_zero(pruned: Network, solver: str, options: dict[str, int]) -> None:
    made = quantize(pruned, X, solver=solver, **options)  # type: ignore[arg-type]
    for weight in made.weights.values():
        assert float((weight.dense() == 0).float().mean()) >= 0.45
    assert brought_back(made, pruned) == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_what_stays_makes_up_for_rounding(pruned: Network, bits: int) -> None:
    options = {"bits_weights": bits, "bits_activations": 8, "reduce_range": False}
    nearest = quantize(pruned, X, solver="rtn", **options)  # type: ignore[arg-type]
    swept = quantize(pruned, X, **options)  # type: ignore[arg-type]
    assert quality(swept, pruned, X) > quality(nearest, pruned, X)


@pytest.mark.parametrize("codes", [False, True])
def test_zeros_stay_zero_while_integers_learn(pruned: Network, codes: bool, tmp_path: Path) -> None:
    teacher = Network.of(trained(Plain), X[:2])
    made = quantize(pruned, X, bits_weights=4)
    found = learn_quantized(
        made, teacher, X, length="20steps", codes=codes, rate=5e-3, augment="none"
    ).quantized
    assert brought_back(found, pruned) == 0
    changed = [
        not torch.equal(w.dense(), made.weights[n].dense()) for n, w in found.weights.items()
    ]
    assert any(changed)
    file = lighten.write_onnx(found, tmp_path / "sparse.onnx")
    assert torch.allclose(_run(file, X[:8]), Simulation(found)(X[:8]), atol=1e-5)


def test_a_twin_of_pruned_integers_is_what_they_compute(pruned: Network) -> None:
    made = quantize(pruned, X, bits_weights=4)
    twin = trainable(made, "all").eval()
    with torch.no_grad():
        assert torch.equal(twin(X[:8]), Simulation(made)(X[:8]))
    twin(X[:8]).square().mean().backward()
    for name, key in ((n, twin.names[n]) for n in made.weights):
        gradient = twin.weights[key].codes.grad
        zero = made.weights[name].dense() == 0
        assert not bool(gradient[zero & (_float(made, name) == 0)].any())
        assert bool(gradient.any())


def _float(made: Quantized, name: str) -> Tensor:
    found = dict(made.network.module.named_parameters())[name]
    return found.detach().reshape(made.weights[name].shape)


def _run(file: Path, x: Tensor) -> Tensor:
    from lighten.runtimes.onnxruntime import Session

    return Session(file)(x)[0]


def test_a_solver_that_knows_of_no_zeros_rounds_all_the_same(pruned: Network) -> None:
    assert quality(quantize(pruned, X, solver="obs"), pruned, X) > 10
