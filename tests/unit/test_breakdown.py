"""Trainings that break down: what is told, and which state stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lighten.course import ImageCourse
from lighten.errors import BadInput, BadOutput
from linear_students import HELD_OUT, INPUTS, distance, learned_of, linear, same

pytest.importorskip("lightning", reason="learning needs lightning")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_loss_that_is_not_finite_stops_and_the_last_good_state_stays(tmp_path: Path) -> None:
    teacher, student = linear(0), linear(1)

    def spoil(step: int, steps: int) -> None:
        if step == 6:
            with torch.no_grad():
                student[0].weight.fill_(float("nan"))  # type: ignore[index, operator, union-attr]

    with pytest.raises(BadOutput, match="broke down at step 6 of 40") as error:
        learned_of(student, teacher, rate=0.3, every=2, before_step=[spoil], folder=tmp_path)
    assert "a lower rate (it was 0.3" in error.value.hint
    assert "another --out or folder" in error.value.hint
    assert "clip" not in error.value.hint
    (best,) = tmp_path.glob("best-*.safetensors")
    assert str(best) in error.value.hint
    kept = load_file(best)
    assert all(torch.equal(kept[k], v) for k, v in student.state_dict().items())
    assert all(bool(torch.isfinite(p).all()) for p in student.parameters())
    assert distance(teacher)(student) > distance(teacher)(linear(1))


def test_a_rate_that_is_far_too_high_is_told_so() -> None:
    with pytest.raises(BadOutput, match="broke down at step") as error:
        learned_of(linear(1), linear(0), rate=1e20, evaluate=lambda m: float(m(HELD_OUT).sum()))
    assert "with a folder the best state before is kept" in error.value.hint


@pytest.mark.parametrize("keep_given", [True, False])
def test_a_breakdown_that_is_accepted_ends_with_the_best_state(keep_given: bool) -> None:
    student, given = linear(1), linear(1)
    found = learned_of(
        student, linear(0), rate=1e20, accept_broken=True, keep_given=keep_given, length="9steps"
    )
    assert found.broke.startswith("learning broke down at step")
    assert found.steps < found.planned == 9
    assert (found.best_step, found.best) == (0, found.first)
    assert same(student, given)
    assert not learned_of(student, linear(0), accept_broken=True, length="2steps").broke


def test_an_accepted_breakdown_keeps_what_was_learned_before_it(tmp_path: Path) -> None:
    teacher, student = linear(0), linear(1)

    def spoil(step: int, steps: int) -> None:
        if step == 6:
            with torch.no_grad():
                student[0].weight.fill_(float("nan"))  # type: ignore[index, operator, union-attr]

    found = learned_of(student, teacher, rate=0.3, every=2, before_step=[spoil], folder=tmp_path,
                       accept_broken=True, keep_given=False)  # fmt: skip
    assert "at step 6 of 40" in found.broke
    assert found.best_step > 0
    assert found.best > found.first
    assert distance(teacher)(student) == pytest.approx(found.best)


def test_what_came_in_broken_is_not_blamed_on_the_rate() -> None:
    spoilt = INPUTS.clone()
    spoilt[:, 0] = float("nan")
    with pytest.raises(BadInput, match="before anything was learned: loss nan") as error:
        learned_of(linear(1), linear(0), data=ImageCourse(spoilt))
    assert "not the rate" in error.value.hint
    with pytest.raises(BadInput, match="evaluation of the network that was given is NaN"):
        learned_of(linear(1), linear(0), evaluate=lambda m: float("nan"))

    def judge(module: nn.Module) -> float:
        raise BadOutput("the network gives NaN")

    with pytest.raises(BadInput, match="that was given cannot be judged: the network gives NaN"):
        learned_of(linear(1), linear(0), evaluate=judge)
