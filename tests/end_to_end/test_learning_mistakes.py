"""What users of recover, distill and compress do wrong, and what goes wrong while they learn."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

pytest.importorskip("lightning", reason="learning needs lightning")

import lighten
from lighten import scales_stage
from lighten.errors import BadInput, BadOutput, WrongUse
from lighten.gradual import GradualPruning
from lighten.images import load_images
from lighten.measure_networks import measure_networks, subject
from lighten.network import Network
from small_networks import images, labels, trained

X = images(160)
Y = labels(trained(), X)
ROW = torch.arange(160)
CPU: dict[str, Any] = {"accelerator": "cpu", "precision": "32-true"}

pytestmark = pytest.mark.usefixtures("one_thread")


class Short:
    """A loader that says that it has more batches than it gives."""

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X.split(40), Y.split(40), strict=True))


def worse() -> nn.Module:
    """The network, less right than it was."""
    module = trained()
    with torch.no_grad():
        module.head.weight.add_(0.3)
    return module


def recovering(data: Any, **options: Any) -> Any:
    asked = {"length": "2steps", "batch": 16, "augment": "none"} | CPU
    return lighten.recover(worse(), trained(), X[:2], data=data, **(asked | options))


def distilling(data: Any, out: Path, **options: Any) -> Any:
    asked = {"length": "2steps", "batch": 16, "augment": "none", "samples": 40} | CPU
    return lighten.distill(trained(), worse(), data, out=out, **(asked | options))


def compressing(data: Any, out: Path, **options: Any) -> Any:
    asked = {"budget": "0.6 macs", "recover": "2steps", "export": "checkpoint", "samples": 40}
    return lighten.compress(trained(), X[:2], data=data, out=out, **(asked | options))


VERBS: list[Callable[[Any, Path], Any]] = [
    lambda data, out: recovering(data),
    distilling,
    compressing,
    lambda data, out: compressing(data, out, recover=None),
]
each_verb = pytest.mark.parametrize("verb", VERBS, ids=["recover", "distill", "compress", "plain"])


def spoilt(at: int, value: float) -> Any:
    x = X.clone()
    x[at, 0, 0, 0] = value
    return x


# -- data ------------------------------------------------------------------------------------------
@each_verb
def test_data_that_ends_early_is_damaged(tmp_path: Path, verb: Any) -> None:
    with pytest.raises(BadInput, match="ended after 4 batches, it said it had 10"):
        verb(Short(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@each_verb
def test_some_batches_without_labels_are_told(tmp_path: Path, verb: Any) -> None:
    with pytest.raises(BadInput, match="1 of 2 batches have no labels"):
        verb([(X[:80], Y[:80]), X[80:]], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@each_verb
def test_data_that_is_not_finite_is_told(tmp_path: Path, verb: Any) -> None:
    with pytest.raises(BadInput, match=r"first in example 7 \(1 of ") as error:
        verb((spoilt(7, float("inf")), Y), tmp_path / "run")
    assert "rate" not in error.value.hint


@each_verb
def test_a_label_that_is_no_class_is_found_at_once(tmp_path: Path, verb: Any) -> None:
    wrong = torch.where(torch.arange(160) == 50, 5, Y)  # of five classes
    # where data is split it is an example of a part
    with pytest.raises(BadInput, match=r"label of example \d+ is 5"):
        verb((X, wrong), tmp_path / "run")


def test_a_label_that_is_no_class_is_named_as_its_file_has_it(tmp_path: Path) -> None:
    pixels = (64 * X + 128).clamp(0, 255).byte().permute(0, 2, 3, 1)
    np.savez(tmp_path / "data.npz", images=pixels.numpy(), labels=torch.where(ROW == 7, 12, Y))
    data = load_images(tmp_path / "data.npz", mean="half", std="half")
    assert data.rows[7] != 7  # drawn in another order
    for verb in (recovering, lambda data: distilling(data, tmp_path / "run")):
        with pytest.raises(BadInput, match=r"the label of .*data\.npz\[7\] is 12"):
            verb(data)


def test_a_request_that_cannot_be_leaves_the_folder_free(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="too small"):
        distilling(X, tmp_path / "run", accumulate=8)
    with pytest.raises(BadInput, match="label of example 7"):
        distilling((X, torch.where(ROW == 7, 12, Y)), tmp_path / "run")
    assert (distilling((X, Y), tmp_path / "run").folder / "metrics.json").is_file()


@pytest.mark.parametrize("verb", [distilling, compressing], ids=["distill", "compress"])
def test_what_is_measured_on_is_other_data(tmp_path: Path, verb: Any) -> None:
    with pytest.raises(WrongUse, match="test is the data itself"):
        verb(X, tmp_path / "run", test=X)
    assert not (tmp_path / "run").exists()


def test_labels_of_no_example_are_no_labels_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="needs labels, the data has none"):
        recovering((X, torch.full((160,), -100)), learn_from="labels")


def test_integers_that_learn_look_at_their_labels_first(tmp_path: Path) -> None:
    wrong = torch.where(torch.arange(160) == 50, 5, Y)
    with pytest.raises(BadInput, match="label of example 50 is 5"):
        compressing((X, wrong), tmp_path / "run", recover=None, learn="2steps", quantize="int8",
                    budget=None)  # fmt: skip
    assert not (tmp_path / "run").exists()


@each_verb
@pytest.mark.parametrize("kind", ["int32", "column", "dataset"])
def test_labels_of_any_form_count(tmp_path: Path, verb: Any, kind: str) -> None:
    data: Any = {
        "int32": (X, Y.int()),
        "column": DataLoader(TensorDataset(X, Y[:, None]), 32),
        "dataset": TensorDataset(X, Y.to(torch.uint8)),
    }[kind]
    found = verb(data, tmp_path / "run").metrics
    measured = found.get("after")
    assert found.get("measure") == "accuracy" or "accuracy" in measured


def test_a_lesson_takes_labels_of_any_form(tmp_path: Path) -> None:
    lesson = "logits:1,labels:0.5"
    found = distilling((X, Y.int()[:, None]), tmp_path / "run", learn_from=lesson)
    assert found.metrics["learning"][0]["measure"] == "accuracy"
    assert recovering((X, Y.short()), learn_from=lesson).metrics["measure"] == "accuracy"


@each_verb
def test_an_example_without_a_label_counts_for_no_accuracy(tmp_path: Path, verb: Any) -> None:
    some = torch.where(torch.arange(160) % 3 == 0, -100, Y)
    found = verb((X, some), tmp_path / "run").metrics
    if "measure" in found:  # of recover: a tenth is held out, ten or eleven of it labelled
        labelled = int((some[-16:] != -100).sum())
        assert (found["after"] * labelled) == pytest.approx(round(found["after"] * labelled))
    else:
        assert 0 < found["after"]["accuracy"]["value"] <= 1


def test_accuracy_is_that_of_the_labelled() -> None:
    right = trained()(X).argmax(1)
    some = torch.where(torch.arange(160) % 4 == 0, -100, right)
    network = Network.of(trained(), X[:2])
    measured = measure_networks(subject(network), None, (X, some))["measured"]
    assert measured["accuracy"]["value"] == 1.0
    some[1] = (some[1] + 1) % 5
    measured = measure_networks(subject(network), None, (X, some))["measured"]
    assert measured["accuracy"]["value"] == pytest.approx(119 / 120)
    none = measure_networks(subject(network), None, (X, torch.full((160,), -100)))
    assert "accuracy" not in none["measured"]


def test_other_examples_than_the_network_takes_are_told() -> None:
    with pytest.raises(BadInput, match=r"held out are \(3, 16\), those to learn from \(3, 16, 16"):
        recovering(X, held_out=X[..., 0])
    with pytest.raises(WrongUse, match=r"teacher does not run on examples \(2, 16, 16\): Runtime"):
        recovering(X[:, :2])


# -- numbers ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rate": "0.1"}, "a rate of '0.1' cannot be"),
        ({"patience": 0}, "a patience of 0 cannot be"),
        ({"average": 2.0}, "an average of 2.0 cannot be"),
        ({"batch": "16"}, "a batch of '16' cannot be"),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(WrongUse, match=text):
        recovering(X, **options)
    with pytest.raises(WrongUse, match=text):
        distilling(X, tmp_path / "run", **options)
    if "rate" in options:
        with pytest.raises(WrongUse, match=text):
            compressing(X, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_sparsity_is_text() -> None:
    with pytest.raises(WrongUse, match=r"sparsity 0\.5 is no text") as error:
        GradualPruning(trained(), 0.5, end=10)  # type: ignore[arg-type]
    assert '"0.5"' in error.value.hint


# -- learning that breaks down ---------------------------------------------------------------------
BROKEN = {"rate": 1e30, "optimizer": "adamw"}


def test_a_distillation_that_breaks_down_says_where_the_best_state_is(tmp_path: Path) -> None:
    with pytest.raises(BadOutput, match="learning broke down at step") as error:
        distilling(X, tmp_path / "run", length="9steps", **BROKEN)
    assert "another --out" in error.value.hint
    assert "is the one that was given" in error.value.hint


def test_a_run_whose_recovery_breaks_down_exports_what_it_had(tmp_path: Path) -> None:
    plain = compressing((X, Y), tmp_path / "plain", recover=None)
    asked: dict[str, Any] = {"recover": "9steps", **BROKEN}
    found = compressing((X, Y), tmp_path / "run", **asked)
    assert found.exported.exists()
    state = plain.module.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in found.module.state_dict().items())
    (learned,) = found.metrics["recover"]
    assert learned["broke"].startswith("learning broke down at step")
    assert (learned["taken"], learned["best_step"]) == ("no", 0)
    assert learned["before"] == learned["after"]
    (problem,) = [p for p in found.metrics["problems"] if "broke down" in p]
    assert "what was there before it is kept" in problem
    assert "with another --out" in problem
    again = compressing((X, Y), tmp_path / "run", **asked)  # it resumes, and learns no more
    assert again.metrics == found.metrics == json.loads((tmp_path / "run/metrics.json").read_text())


def test_integers_whose_learning_breaks_down_stay_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    learn = scales_stage.learned_twin

    def wild(*arguments: Any, **options: Any) -> Any:
        return learn(*arguments, **options | {"rate": 1e30})

    monkeypatch.setattr(scales_stage, "learned_twin", wild)
    found = compressing((X, Y), tmp_path / "run", recover=None, learn="6steps", quantize="int8",
                        budget=None, export="onnx")  # fmt: skip
    (learned,) = found.metrics["recover"]
    assert learned["taken"] == "no"
    assert "broke" in learned
    assert any("--learn none" in p for p in found.metrics["problems"])
