"""What is learned from without a word: classes where there are any, else numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lighten
from lighten.course import ImageCourse
from lighten.errors import WrongUse
from lighten.lesson import Lesson, Seen
from lighten.mirrored import mirrors
from lighten.network import Network
from lighten.network_quality import compare_outputs
from lighten.recover import Judge
from lighten.training_data import training_data
from lighten.usual_lesson import lesson_for, usual_lesson

X = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def regressor(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))


def disturbed(teacher: nn.Sequential) -> nn.Sequential:
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student[2].weight.add_(0.5 * torch.randn(1, 16, generator=torch.Generator().manual_seed(1)))
    return student


@torch.no_grad()
def error(student: Any, teacher: nn.Module) -> float:
    return float((student(X) - teacher(X)).norm() / teacher(X).norm())


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# the loss


def alone(text: str, student: Tensor, teacher: Tensor) -> float:
    return float(Lesson.parse(text)(Seen(student), Seen(teacher))[0])


@pytest.mark.parametrize("shape", [(9, 1), (9, 4), (3, 5, 2), (2, 4, 4, 3)])
def test_outputs_are_the_error_as_a_share_of_the_variance(shape: tuple[int, ...]) -> None:
    s, t = draw(0, *shape), 3 * draw(1, *shape) + 7
    flat = t.reshape(-1, shape[-1])
    expected = (s - t).square().sum() / (flat.var(0, correction=0).sum() * len(flat))
    assert alone("outputs", s, t) == pytest.approx(float(expected), rel=1e-4)
    assert alone("outputs", t, t) == 0
    # in other units it is the same
    assert alone("outputs", 5 * s + 2, 5 * t + 2) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("teacher", [torch.full((4, 1), 3.0), torch.full((1, 2), 3.0)])
def test_of_outputs_that_do_not_vary_it_is_a_share_of_their_square(teacher: Tensor) -> None:
    assert alone("outputs", 1.5 * teacher, teacher) == pytest.approx(0.25)
    nothing = torch.zeros(4, 1, requires_grad=True)
    total, _ = Lesson.parse("outputs")(Seen(nothing), Seen(torch.zeros(4, 1)))
    total.backward()
    assert nothing.grad is not None
    assert bool(torch.isfinite(nothing.grad).all())


@pytest.mark.parametrize("text", ["logits", "topk", "decoupled:target=teacher", "decoupled"])
def test_one_class_is_no_class(text: str) -> None:
    lesson, seen = Lesson.parse(text), Seen(draw(0, 4, 1))
    with pytest.raises(WrongUse, match=r'compares classes[\s\S]*"outputs:1"'):
        lesson(seen, seen, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(WrongUse, match="`labels` compares classes"):
        Lesson.parse("labels")(seen, None, torch.zeros(4, dtype=torch.int64))


# which lesson


class Tokens(nn.Module):
    def __init__(self, out: int) -> None:
        super().__init__()
        self.layer = nn.Linear(8, out)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


@pytest.mark.parametrize(
    ("module", "inputs", "lesson"),
    [
        (nn.Linear(8, 5), X[:2], "logits:1"),
        (nn.Linear(8, 8), X[:2], "logits:1"),
        (nn.Linear(8, 1), X[:2], "outputs:1"),
        (nn.Conv2d(3, 5, 3, padding=1), IMAGES[:2], "logits:1"),
        (nn.Conv2d(3, 1, 3, padding=1), IMAGES[:2], "outputs:1"),
        (nn.Conv2d(3, 3, 3, padding=1), IMAGES[:2], "outputs:1"),
        (Tokens(5), draw(0, 2, 6, 8), "logits:1"),
        (Tokens(8), draw(0, 2, 6, 8), "outputs:1"),
        (nn.Sequential(nn.Embedding(9, 8), Tokens(9)), torch.ones(2, 6).long(), "logits:1"),
    ],
)
def test_it_is_of_classes_where_outputs_have_some(
    module: nn.Module, inputs: Tensor, lesson: str
) -> None:
    network = Network.of(module, inputs)
    assert usual_lesson(network) == lesson
    assert str(lesson_for(None, network)) == lesson
    assert str(lesson_for("outputs:2", network)) == "outputs:2"


def test_outputs_in_the_form_of_the_input_are_a_guess_that_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual_lesson(Network.of(nn.Conv2d(3, 5, 3, padding=1), IMAGES[:2]))
    assert not capsys.readouterr().err
    usual_lesson(Network.of(nn.Conv2d(3, 3, 3, padding=1), IMAGES[:2]))
    assert 'if they are logits of 3 classes, learn from "logits:1"' in capsys.readouterr().err


def test_a_lesson_of_classes_for_a_number_is_refused_before_anything_is_computed() -> None:
    pytest.importorskip("lightning")
    teacher = regressor()
    for text in ("logits:1", "decoupled:target=teacher", "topk", "outputs:1,logits:0.5"):
        with pytest.raises(WrongUse, match="compares classes"):
            lighten.recover(disturbed(teacher), teacher, X[:2], data=X, learn_from=text)
        with pytest.raises(WrongUse, match="compares classes"):
            lighten.distill(teacher, disturbed(teacher), X, learn_from=text)


# the verbs


def test_a_number_is_learned_back(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    teacher = regressor()
    student = disturbed(teacher)
    asked: dict[str, Any] = {"length": "50steps"}
    back = lighten.recover(student, teacher, X[:2], data=X, **asked)
    taught = lighten.distill(teacher, student, X, out=tmp_path / "run", **asked)
    for module in (back.network.module, taught.module):
        assert error(module, teacher) < 0.3 * error(student, teacher)
    assert back.metrics["learn_from"] == taught.metrics["learn_from"] == "outputs:1"
    assert back.metrics["measure"] == "relative_error"
    assert taught.metrics["learning"][0]["measure"] == "relative_error"
    assert "mean_kld" not in taught.metrics["after"]


def test_integers_learn_a_number() -> None:
    pytest.importorskip("lightning")
    from lighten.learn_quantized import quantize_and_learn
    from lighten.quantize_network import quantize

    network = Network.of(regressor(), X[:2])
    found = quantize_and_learn(network, X, lambda x: quantize(network, x), length="3steps")
    assert found.metrics["learn_from"] == "outputs:1"
    assert found.metrics["measure"] == "relative_error"


def test_several_numbers_said_to_be_numbers_are_judged_as_numbers(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    torch.manual_seed(0)
    teacher, student = nn.Linear(8, 3), nn.Linear(8, 3)
    asked: dict[str, Any] = {"length": "5steps", "learn_from": "outputs:1"}
    back = lighten.recover(student, teacher, X[:2], data=X, **asked)
    assert back.metrics["measure"] == "relative_error"
    taught = lighten.distill(teacher, student, X, out=tmp_path / "run", **asked)
    assert taught.metrics["learning"][0]["measure"] == "relative_error"
    assert "mean_kld" not in taught.metrics["after"]


@pytest.mark.parametrize("kind", ["segments", "tokens"])
def test_logits_of_places_are_judged_and_shown_by_divergence(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    torch.manual_seed(0)
    x = IMAGES if kind == "segments" else draw(0, 64, 6, 8)
    teacher, student = (
        nn.Conv2d(3, 5, 3, padding=1) if kind == "segments" else Tokens(5) for _ in range(2)
    )
    back = lighten.recover(student, teacher, x[:2], data=x, length="10steps")
    assert back.metrics["measure"] == "mean_kld"
    assert 0 < back.metrics["after"] < back.metrics["before"]
    taught = lighten.distill(teacher, student, x, length="10steps", out=tmp_path / "run")
    assert taught.metrics["learning"][0]["measure"] == "mean_kld"
    after = taught.metrics["after"]["mean_kld"]["value"]
    assert 0 < after < taught.metrics["before"]["mean_kld"]["value"]
    judge = Judge(Network.of(teacher, x[:2]), training_data(x, tested=True))
    logits = (teacher(judge.data.held_out), student(judge.data.held_out))
    p, q = ((y.movedim(1, -1) if kind == "segments" else y).log_softmax(-1) for y in logits)
    wanted = float((p.exp() * (p - q)).sum(-1).mean().detach())
    assert judge(student) == pytest.approx(-wanted, rel=1e-4)


def test_divergence_of_places_is_the_mean_over_them() -> None:
    ours, theirs = draw(0, 6, 3, 4, 4), draw(1, 6, 3, 4, 4)
    places = [y.movedim(1, -1).reshape(-1, 3) for y in (ours, theirs)]
    whole = compare_outputs(ours, reference=theirs, logits=True, resamples=2).as_dict()
    flat = compare_outputs(places[0], reference=places[1], resamples=2).as_dict()
    for name in ("mean_kld", "top1_agreement"):
        assert whole[name]["value"] == pytest.approx(flat[name]["value"])  # type: ignore[index]


def test_numbers_are_asked_twice_only_where_that_is_said() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))
    network, course = Network.of(module, IMAGES[:2]), ImageCourse(IMAGES, augment="flip")
    lesson = Lesson.parse("outputs")
    assert not mirrors(None, network, lesson, course)
    assert mirrors(True, network, lesson, course)
