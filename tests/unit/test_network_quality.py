"""Networks compared by their outputs: numbers by hand, intervals that are paired, mistakes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lighten.errors import BadInput, BadOutput, UserError, WrongUse
from lighten.network import Network
from lighten.network_quality import compare_outputs, measure_network, outputs

N, CLASSES = 400, 5


def logits(seed: int, scale: float = 2.0) -> Tensor:
    return torch.randn(N, CLASSES, generator=torch.Generator().manual_seed(seed)) * scale


def test_numbers_by_hand() -> None:
    reference = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [1.0, 0.0]])
    ours = torch.tensor([[2.0, 0.0], [1.0, 0.0], [3.0, 1.0], [1.0, 0.0]])
    found = compare_outputs(ours, torch.tensor([0, 1, 1, 0]), reference)
    assert found.examples == 4
    assert found.accuracy is not None
    assert found.accuracy.value == 0.5
    assert found.reference_accuracy is not None
    assert found.reference_accuracy.value == 0.75
    assert found.accuracy_change is not None
    assert found.accuracy_change.value == -0.25
    assert found.top1 is not None
    assert found.top1.value == 0.75
    p, q = reference.double().softmax(1), ours.double().softmax(1)
    kld = (p * (p / q).log()).sum(1)
    assert found.kld_mean is not None
    assert found.kld_mean.value == pytest.approx(float(kld.mean()), rel=1e-12)
    assert found.kld_p99 is not None
    assert found.kld_p99.value == pytest.approx(float(np.quantile(kld.numpy(), 0.99)))
    assert found.sqnr is not None
    assert found.sqnr.value == pytest.approx(10 * math.log10(15 / 3))  # 4+1+9+1 over 1+1+1
    assert found.relative_error is not None
    assert found.relative_error.value == pytest.approx(math.sqrt(3 / 15))


def test_torch_has_the_same_divergence() -> None:
    a, b = logits(0), logits(1)
    found = compare_outputs(a, reference=b).kld_mean
    want = nn.functional.kl_div(
        a.double().log_softmax(1), b.double().log_softmax(1), reduction="batchmean", log_target=True
    )
    assert found is not None
    assert found.value == pytest.approx(float(want))


def test_the_same_network_is_no_distance_away() -> None:
    found = compare_outputs(logits(0), torch.zeros(N, dtype=torch.long), logits(0))
    facts: dict[str, Any] = found.as_dict()
    assert facts["mean_kld"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert facts["top1_agreement"]["low"] == 1.0
    assert facts["sqnr_db"]["value"] == 200.0
    assert facts["relative_error"]["value"] == 0.0
    assert facts["accuracy_change"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert facts["accuracy"]["low"] < facts["accuracy"]["value"] < facts["accuracy"]["high"]


def test_intervals_are_paired() -> None:
    """Two networks that differ in a few answers: their difference is known far better than each."""
    labels = logits(0).argmax(1)
    ours = logits(0) + logits(3)
    other = ours.clone()
    other[:8] = -other[:8]
    found = compare_outputs(other, labels, ours)
    assert found.accuracy is not None
    assert found.accuracy.low is not None
    assert found.accuracy.high is not None
    assert found.accuracy_change is not None
    assert found.accuracy_change.low is not None
    assert found.accuracy_change.high is not None
    alone = found.accuracy.high - found.accuracy.low
    assert (found.accuracy_change.high - found.accuracy_change.low) < 0.5 * alone
    assert found.as_dict() == compare_outputs(other, labels, ours).as_dict()


def test_what_was_not_measured_is_left_out() -> None:
    assert compare_outputs(logits(0)).as_dict() == {"examples": N}
    assert set(compare_outputs(logits(0), logits(1).argmax(1)).as_dict()) == {
        "examples", "accuracy"
    }  # fmt: skip
    values = {"examples", "sqnr_db", "relative_error"}
    assert set(compare_outputs(logits(0), reference=logits(1), logits=False).as_dict()) == values
    pictures = torch.randn(6, 3, 4, 4)
    assert set(compare_outputs(pictures, reference=pictures + 0.1).as_dict()) == values
    one = torch.randn(6, 1)
    assert set(compare_outputs(one, reference=one).as_dict()) == values


def test_outputs_of_pixels_one_by_one_are_logits() -> None:
    x = logits(0)
    assert "accuracy" in compare_outputs(x[:, :, None, None], x.argmax(1)).as_dict()


class Net(nn.Module):
    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(7, CLASSES)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        z = self.layer(x)
        return {
            "tensor": z, "tuple": (z, x), "dict": {"hidden": x, "logits": z},
            "array": z.detach().numpy(), "half": z.half(), "number": 3, "scalar": z.sum(),
        }[self.form]  # fmt: skip


X = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "array", "half"])
def test_networks_may_return_what_they_like(form: str) -> None:
    found = outputs(Network.of(Net(form), X[:2]), X, 8)
    assert torch.allclose(found, Net()(X), atol=1e-2 if form == "half" else 1e-6)
    assert found.dtype == torch.float32


def test_data_in_batches_and_references_of_both_kinds() -> None:
    network, other = Network.of(Net(), X[:2]), Network.of(nn.Linear(7, CLASSES), X[:2])
    labels = torch.arange(50) % CLASSES
    whole = measure_network(network, X, labels, reference=other)
    pairs = [(X[:20], labels[:20]), (X[20:], labels[20:])]
    again = measure_network(network, pairs, labels, reference=outputs(other, X))
    assert whole.accuracy == again.accuracy
    assert whole.reference_accuracy == again.reference_accuracy
    assert whole.kld_mean is not None
    assert again.kld_mean is not None
    assert whole.kld_mean.value == pytest.approx(again.kld_mean.value, rel=1e-4)
    assert whole.outputs is not None
    assert whole.outputs.shape == (50, CLASSES)


def test_a_function_of_the_user_says_what_counts() -> None:
    network = Network.of(Net(), X[:2])
    seen = []

    def evaluate(model: Any) -> Tensor:
        seen.append(model)
        return torch.tensor(0.25)

    labels = torch.zeros(50, dtype=torch.long)
    found = measure_network(network, X, labels, reference=network, evaluate=evaluate)
    assert seen == [network]
    assert found.as_dict()["evaluate"] == 0.25
    assert "accuracy" not in found.as_dict()
    assert "top1_agreement" in found.as_dict()


def once() -> Iterator[Tensor]:
    yield X


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: outputs(Net("number"), X), WrongUse, "gave a int"),
        (lambda: outputs(Net("scalar"), X), WrongUse, "one number for a whole batch"),
        (lambda: outputs(Net(), X[:0]), BadInput, "no example"),
        (lambda: measure_network(Net(), once_data, reference=Net()), BadInput, "no example"),
        (lambda: compare_outputs(X[:, :5] / 0.0 * 0), BadOutput, "NaN .* for 50 of 50"),
        (lambda: compare_outputs(X, reference=X / 0.0), BadOutput, "the reference gives"),
        (lambda: compare_outputs(X, reference=X[:9]), WrongUse, "gives .50, 7., its .* .9, 7."),
        (lambda: compare_outputs(X, torch.full((50,), 7)), BadInput, "is 7, but .* 7 classes"),
        (lambda: compare_outputs(X, torch.full((50,), -1)), BadInput, "example 0 is -1"),
        (lambda: compare_outputs(X, torch.zeros(9)), WrongUse, "50 examples and labels of"),
        (lambda: compare_outputs(X[:, :1], torch.zeros(50)), WrongUse, "no logits"),
        (lambda: measure_network(Net(), X, evaluate=lambda m: "x"), WrongUse, "returned a str"),
        (lambda: measure_network(Net(), X, evaluate=lambda m: math.nan), BadOutput, "NaN"),
    ],
)
def test_a_mistake_is_named(call: Any, kind: type[UserError], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()


once_data = once()


def test_noise_without_a_signal() -> None:
    zero = torch.zeros(4, 3)
    assert compare_outputs(zero, reference=zero).as_dict()["relative_error"] == {
        "value": 0.0, "low": 0.0, "high": 0.0
    }  # fmt: skip
    loud = compare_outputs(zero + 1, reference=zero).sqnr
    assert loud is not None
    assert loud.value == -200.0
