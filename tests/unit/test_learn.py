"""The loop: it learns, keeps the best, survives kills to the bit."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_learning import STEPS, data, network, training
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lighten.course import ImageCourse
from lighten.errors import BadInput, ChangedRequest, MissingPackage, WrongUse
from lighten.learn import Length, learn
from lighten.learn_state import join_state, load_optimizer, optimizer_state, split_state
from lighten.learning_rate import rate_at
from lighten.lesson import Lesson
from lighten.moving_average import MovingAverage
from lighten.optimizers import make_optimizer
from linear_students import CPU, INPUTS, distance, learned_of, linear, same

pytest.importorskip("lightning", reason="learning needs lightning")

PROGRAM = Path(__file__).parent / "killed_learning.py"

pytestmark = pytest.mark.usefixtures("one_thread")


# -- learning --------------------------------------------------------------------------------------
@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.3), ("adamw", 0.03)])
def test_a_student_comes_nearer_to_its_teacher(optimizer: str, rate: float) -> None:
    teacher, student = linear(0), linear(1)
    found = learned_of(student, teacher, optimizer=optimizer, rate=rate, weight_decay=0.0)
    assert found.best > 0.7 * found.first  # both are below zero
    assert distance(teacher)(student) == pytest.approx(found.best)
    assert found.steps == found.planned == 40
    assert [row["step"] for row in found.history][-1] == 40
    assert {"loss", "logits", "rate", "held_out"} <= found.history[-1].keys()


def test_labels_alone_need_no_teacher() -> None:
    teacher, student = linear(0), linear(1)
    y = teacher(INPUTS).argmax(1)
    found = learn(
        student, None, Lesson.parse("labels"), ImageCourse(INPUTS, y), length="20epochs", rate=0.3,
        batch=16, evaluate=lambda m: float((m(INPUTS).argmax(1) == y).double().mean()), **CPU,
    )  # fmt: skip
    assert found.best > max(found.first, 0.9)


def test_it_never_gives_back_worse_than_it_was_given() -> None:
    teacher = linear(0)
    student = copy.deepcopy(teacher)
    before = copy.deepcopy(student)
    y = torch.zeros(64, dtype=torch.long)  # a lesson that leads away from the teacher
    found = learned_of(student, teacher, lesson="labels", data=ImageCourse(INPUTS, y), rate=1.0)
    assert found.best == found.first
    assert found.best_step == 0
    assert same(student, before)


def test_what_the_networks_were_is_restored() -> None:
    student, teacher = network(4, 1).eval(), network(8, 0).train()
    teacher[0].eval()  # type: ignore[index]
    student[0].weight.requires_grad_(False)  # type: ignore[index, operator, union-attr]
    frozen = student[0].weight.clone()  # type: ignore[index, operator, union-attr]
    state = torch.get_rng_state()
    learn(
        student, teacher, Lesson.parse("logits"), ImageCourse(data(2, 32)), length="4steps",
        rate=0.1, batch=8, evaluate=lambda m: float(m(data(3, 8)).sum()), **CPU,
    )  # fmt: skip
    assert not student.training
    assert [part.training for part in teacher] == [False, *[True] * 6]  # type: ignore[attr-defined]
    assert all(p.is_contiguous() for p in student.parameters())
    assert torch.equal(student[0].weight, frozen)  # type: ignore[index, union-attr]
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(part._forward_hooks for part in student.modules())


def test_the_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    made = []
    for seed in (0, 0, 1):
        student = linear(1)
        learned_of(student, linear(0), seed=seed)
        made.append(student)
    assert same(made[0], made[1])
    assert not same(made[0], made[2])


def test_a_batch_in_parts_gives_the_same_gradient() -> None:
    made = []
    for accumulate in (1, 4):
        student = linear(1)
        learned_of(student, linear(0), accumulate=accumulate)
        made.append(student)
    for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_bfloat16_learns_too_and_weights_stay_float32() -> None:
    teacher, student = network(8, 0), network(8, 1)
    x = data(3, 32)
    with torch.no_grad():
        wanted = teacher.eval()(x)
    found = learn(
        student, teacher, Lesson.parse("logits"), ImageCourse(data(2, 64)), length="10epochs",
        rate=0.1, batch=16, evaluate=lambda m: -float((m(x) - wanted).square().mean()),
        accelerator="cpu", precision="bf16-mixed",
    )  # fmt: skip
    assert found.best > found.first
    assert all(p.dtype == torch.float32 for p in student.parameters())


def test_a_forward_that_needs_the_usual_layout_keeps_it() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(256, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).view(len(x), -1))

    found = learn(
        Views(), Views(), Lesson.parse("logits"), ImageCourse(torch.randn(16, 2, 8, 8)),
        length="2steps", rate=0.1, batch=8, evaluate=lambda m: 0.0, **CPU,
    )  # fmt: skip
    assert found.steps == 2


def test_it_stops_where_nothing_gets_better() -> None:
    found = learned_of(linear(1), linear(0), evaluate=lambda m: 0.0, patience=3, every=2)
    assert found.steps == 6
    assert found.planned == 40


class Told:
    """An evaluation that says what it is told, and by how much chance may move that."""

    def __init__(self, values: list[float], margin: float) -> None:
        self.values, self.apart = iter(values), margin

    def __call__(self, module: nn.Module) -> float:
        return next(self.values)

    def margin(self, value: float) -> float:
        return self.apart


@pytest.mark.parametrize(
    ("values", "margin", "step"),
    [
        ([0.5, 0.8, 0.9, 0.85, 0.88], 0.0, 4),  # the best
        ([0.5, 0.8, 0.9, 0.85, 0.88], 0.03, 8),  # the last that may be as good as the best
        ([0.5, 0.8, 0.9, 0.85, 0.82], 0.06, 6),  # not measured from one kept for being late
        ([0.5, 0.4, 0.3, 0.2, 0.1], 1.0, 0),  # none below what was given
        ([0.5, 0.6, 0.4, 0.4, 0.4], 1.0, 2),
    ],
)
def test_of_states_that_chance_may_tell_apart_the_later_is_kept(
    values: list[float], margin: float, step: int
) -> None:
    evaluate = Told(values, margin)
    found = learned_of(linear(1), linear(0), evaluate=evaluate, every=2, length="8steps")
    assert found.best_step == step
    assert found.best == (values[step // 2])


def test_an_average_of_the_weights_is_evaluated_and_may_be_the_best() -> None:
    teacher, student = linear(0), linear(1)
    found = learned_of(student, teacher, average=0.8, rate=1.5, warm_up=0.0)
    rows = [row for row in found.history if "held_out_average" in row]
    assert rows
    assert found.best == max(
        found.first, *(max(row["held_out"], row["held_out_average"]) for row in rows)
    )
    assert distance(teacher)(student) == pytest.approx(found.best)


def test_penalties_and_hooks_are_part_of_every_step() -> None:
    student, calls = linear(1), []

    def after(step: int, steps: int) -> None:
        assert student[0].weight.grad is not None  # type: ignore[index, union-attr]
        calls.append(("after", step, steps))

    learned_of(
        student, linear(0), length="2steps",
        penalty=lambda: 100 * student[0].weight.square().sum(),  # type: ignore[index, operator, union-attr]
        before_step=[lambda step, steps: calls.append(("before", step, steps))],
        after_step=[after],
    )  # fmt: skip
    assert calls == [("before", 0, 2), ("after", 1, 2), ("before", 1, 2), ("after", 2, 2)]


# -- kills -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of trainings that were killed: sgd and adamw at step 7, sometime at some steps."""
    if not hasattr(os, "fork"):
        pytest.skip("there is no SIGKILL")
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_killed_training_goes_on_to_the_same_bits(killed: Path, optimizer: str) -> None:
    assert [p.name for p in (killed / optimizer).glob("step-*")] == ["step-6.safetensors"]
    student, again = training(killed / optimizer, optimizer=optimizer)
    whole, learned = training(None, optimizer=optimizer)
    assert again.history == learned.history
    assert (again.best, again.best_step, again.steps) == (learned.best, learned.best_step, STEPS)
    assert same(student, whole)


def test_a_kill_at_any_moment_leaves_a_state_to_go_on_from(killed: Path) -> None:
    assert list((killed / "sometime").glob("step-*"))
    student, again = training(killed / "sometime")
    whole, learned = training(None)
    assert again.history == learned.history
    assert same(student, whole)


def test_a_finished_training_is_not_made_again(tmp_path: Path) -> None:
    first, learned = training(tmp_path)
    second, again = training(tmp_path)
    assert same(first, second)
    assert again.history == learned.history
    assert (again.best, again.first) == (learned.best, learned.first)
    assert not list((tmp_path / ".partial").iterdir())
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert rows == learned.history


def test_another_request_is_refused(tmp_path: Path) -> None:
    learned_of(linear(1), linear(0), length="2steps", folder=tmp_path)
    with pytest.raises(ChangedRequest, match="another training") as error:
        learned_of(linear(1), linear(0), length="2steps", folder=tmp_path, rate=0.2)
    assert "rate: 0.1 -> 0.2" in error.value.hint
    with pytest.raises(ChangedRequest, match="another training"):
        learned_of(linear(2), linear(0), length="2steps", folder=tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    learned_of(linear(1), linear(0), length="2steps", folder=tmp_path)
    (tmp_path / "step-2.safetensors").write_bytes(b"not whole")
    with pytest.raises(BadInput, match=r"step-2\.safetensors cannot be read"):
        learned_of(linear(1), linear(0), length="2steps", folder=tmp_path)


def test_events_are_there_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="events need tensorboard")
    learned_of(linear(1), linear(0), folder=tmp_path)
    assert list((tmp_path / "tensorboard").glob("events*"))


# -- mistakes --------------------------------------------------------------------------------------
def test_data_that_ends_early_is_told_with_its_step() -> None:
    batches = ((INPUTS[i : i + 8], None) for i in range(0, 32, 8))
    with pytest.raises(BadInput, match="the data ended at step 4"):
        learned_of(linear(1), linear(0), data=batches, length="10steps")


def test_a_loader_is_learned_from_as_a_course_is() -> None:
    loader = DataLoader(TensorDataset(INPUTS, torch.zeros(64)), 16, shuffle=True)
    teacher, student = linear(0), linear(1)
    found = learned_of(student, teacher, data=loader, rate=0.3)
    assert found.steps == 40
    assert found.best > found.first


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rate": 0.0}, "a rate of 0"),
        ({"rate": "0.1"}, "a rate of '0.1' cannot be"),
        ({"rate": float("inf")}, "a rate of inf"),
        ({"patience": 0}, "a patience of 0"),
        ({"patience": 1.5}, "a patience of 1.5"),
        ({"average": 2.0}, "an average of 2.0"),
        ({"average": 1}, "an average of 1"),
        ({"clip": -1.0}, "to clip gradients at -1.0"),
        ({"batch": "16"}, "a batch of '16'"),
        ({"accumulate": 0}, "in so many parts: 0"),
        ({"length": "soon"}, "length `soon`"),
        ({"optimizer": "lion"}, "optimizer `lion`"),
        ({"precision": "int8"}, "precision `int8`"),
        ({"strategy": "deepspeed"}, "deepspeed"),
        ({"batch": 65}, "a batch has 65 examples, the data 64"),
        ({"lesson": "labels"}, "label"),
        ({"data": 3}, "a int cannot be learned from"),
        ({"data": ImageCourse(INPUTS, torch.full((64,), 7)), "lesson": "labels"}, "7"),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], text: str) -> None:
    with pytest.raises((WrongUse, BadInput), match=text):
        learned_of(linear(1), linear(0), **options)


def test_a_lesson_that_needs_a_teacher_says_so() -> None:
    with pytest.raises(WrongUse, match="needs a teacher"):
        learn(
            linear(), None, Lesson.parse("logits"), ImageCourse(INPUTS), length="1step", rate=0.1,
            batch=8, evaluate=lambda m: 0.0, **CPU,
        )  # fmt: skip


def test_without_lightning_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.fabric", None)
    with pytest.raises(MissingPackage, match="lightning") as error:
        learned_of(linear(1), linear(0))
    assert "lighten[train]" in error.value.hint


# -- pieces ----------------------------------------------------------------------------------------
def test_the_rate_rises_then_falls_to_zero() -> None:
    rates = [rate_at(n, 100, 0.4) for n in range(100)]
    assert max(rates) == rates[4] == 0.4
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert rate_at(0, 1, 0.4) > 0


def test_lengths_are_read() -> None:
    assert Length.parse("0.5 epochs").steps(10) == 5
    assert Length.parse("1epoch").steps(7) == 7
    with pytest.raises(WrongUse, match="says how long it is"):
        Length.parse("2epochs").steps(None)
    for text in ("0steps", "1.5steps", "-3epochs", "10", "epochs"):
        with pytest.raises(WrongUse, match="length"):
            Length.parse(text)


def test_norms_and_biases_do_not_decay() -> None:
    module = network(4, 0)
    made = make_optimizer("adamw", module.named_parameters(), decay=0.1)
    decays = {id(p): g["weight_decay"] for g in made.param_groups for p in g["params"]}
    named = {name: decays[id(p)] for name, p in module.named_parameters()}
    assert named == {"0.weight": 0.1, "1.weight": 0, "1.bias": 0, "6.weight": 0.1, "6.bias": 0}


def test_an_average_is_taken_out_again() -> None:
    module = linear(0)
    average = MovingAverage(module, 0.5)
    before = copy.deepcopy(module)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    average.update(module, 100)
    moved = copy.deepcopy(module)
    with average.inside(module):
        assert torch.allclose(module[0].weight, before[0].weight + 0.5)  # type: ignore[index, operator, union-attr]
    assert same(module, moved)


def test_the_steps_of_a_fused_optimizer_are_counted_on_its_device() -> None:
    there = nn.Parameter(torch.ones(3, 2))
    made = torch.optim.AdamW([there])
    there.grad = torch.ones(3, 2)
    made.step()
    stored = {k: v.clone() for k, v in optimizer_state(made, {there: "w"}).items()}
    for fused, device in ((False, "cpu"), (True, "meta")):
        here = nn.Parameter(torch.ones(3, 2, device="meta"))
        again = torch.optim.AdamW([here])
        again.param_groups[0]["fused"] = fused  # meta has no kernels, which are not called
        load_optimizer(again, {here: "w"}, stored)
        assert again.state[here]["step"].device.type == device
        assert again.state[here]["exp_avg"].device.type == "meta"


def test_states_become_json_and_tensors_and_come_back() -> None:
    state = {"a": torch.ones(2), "b": [1, {"c": torch.zeros(())}], "d": None, "tensor": "x"}
    plain, tensors = split_state(state, "s")
    back = join_state(json.loads(json.dumps(plain)), tensors)
    assert torch.equal(back["a"], state["a"])
    assert torch.equal(back["b"][1]["c"], torch.zeros(()))
    assert (back["b"][0], back["d"], back["tensor"]) == (1, None, "x")
