"""Mistakes in calls of compress() with a network are told, with what to do instead."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compressed_networks import EXAMPLE, X, Y, compress, size
from lighten import errors, front
from small_networks import CLASSES, SIDE, trained

pytestmark = pytest.mark.usefixtures("steady")


class Odd(nn.Module):
    """Its weights are of a type that ONNX is not written in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.register_buffer("shift", torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) + self.shift.float()).mean((2, 3))


def _with_nan() -> nn.Module:
    module = trained()
    with torch.no_grad():
        module.conv1.weight[0, 0, 0, 0] = float("nan")
    return module


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"data": (X, Y + 1)}, errors.BadInput, f"is {CLASSES}, but the network has {CLASSES}"),
        ({"data": (X, Y - CLASSES)}, errors.BadInput, "the label of example 0 is -"),
        ({"data": (X, Y[:9])}, errors.BadInput, "96 inputs and 9 labels"),
        ({"data": X.clone().fill_(math.nan)}, errors.BadInput, "NaN"),
        ({"data": X[:, :, :8, :8]}, errors.WrongUse, f"(3, 8, 8) and the network takes (3, {SIDE}"),
        ({"data": X[:1]}, errors.BadInput, "two are needed"),
        ({"data": 3}, errors.WrongUse, "int is no data"),
        ({"data": None}, errors.WrongUse, "needs data"),
        ({"data": "nowhere.npz"}, errors.UserError, "nowhere.npz"),
        ({"module": _with_nan()}, errors.BadInput, "`conv1.weight`"),
        ({"module": Odd()}, errors.WrongUse, "float64"),
        ({"quantize": "int9"}, errors.WrongUse, "int9"),
        ({"export": "onxx"}, errors.UnknownName, "did you mean `onnx`"),
        ({"export": "gguf"}, errors.WrongUse, "checkpoint, onnx"),
        ({"budget": "4.5bpw"}, errors.WrongUse, "bits per weight"),
        ({"budget": "many"}, errors.WrongUse, "many"),
        ({"budget": "0.001 macs"}, errors.ImpossibleBudget, "macs"),
        ({"max_kld": 0.1}, errors.WrongUse, "language models"),
        ({"samples": 0}, errors.WrongUse, "0 examples"),
        ({"multiple": 0}, errors.WrongUse, "multiple"),
    ],
)
def test_mistakes_are_told(
    options: dict[str, Any], kind: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        compress(tmp_path / "run", **{"budget": "0.5 macs", **options})
    assert said in str(caught.value)
    assert caught.value.hint or "data" in options  # type: ignore[attr-defined]


def test_an_impossible_size_says_the_smallest(tmp_path: Path) -> None:
    with pytest.raises(errors.ImpossibleBudget) as caught:
        compress(tmp_path / "run", budget="1kB", quantize="none", export="checkpoint")
    assert "budget in bytes" in caught.value.message
    least = float(caught.value.message.rpartition(" ")[2].replace(",", ""))
    room = 1.05 * least
    found = compress(
        tmp_path / "again", budget=f"{room / 1000}kB", quantize="none", export="checkpoint"
    )
    assert size(found.exported) <= room


@pytest.mark.parametrize(
    "option",
    [
        {"example_inputs": EXAMPLE}, {"evaluate": len}, {"quantize": "int8"}, {"weights": "w.pt"},
        {"size": 32}, {"mean": "imagenet"}, {"std": "imagenet"}, {"test": X}, {"multiple": 8},
        {"crop": "squash"}, {"sparsity": "0.5"},
    ],
)  # fmt: skip
def test_options_of_networks_are_refused_for_language_models(
    option: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(errors.WrongUse, match="is for networks"):
        front.compress(str(tmp_path), budget="80MB", **option)


def test_a_module_without_examples(tmp_path: Path) -> None:
    with pytest.raises(errors.WrongUse, match="example inputs"):
        front.compress(trained(), data=X, budget="0.5 macs")
