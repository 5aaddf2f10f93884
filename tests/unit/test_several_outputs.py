"""Networks with several outputs: all of them are taught, judged and measured."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lighten
from lighten.errors import WrongUse
from lighten.heads import beside
from lighten.lesson import Lesson, Seen
from lighten.mirrored import Mirrored
from lighten.network import Network
from lighten.network_quality import all_outputs, compare_outputs, measure_network, outputs
from lighten.recover import Judge
from lighten.showing import Shown
from lighten.training_data import training_data
from lighten.validation import Validation
from lighten.watch import every_output, watch

X = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))


class Heads(nn.Module):
    """A body and two heads, returned as a tuple, a list or by name."""

    def __init__(self, form: str = "tuple", second: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.a, self.b = nn.Linear(16, 5), nn.Linear(16, second)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        a, b = self.a(h), self.b(h)
        return {"tuple": (a, b), "list": [a, b], "dict": {"b": b, "logits": a}}[self.form]


class First(nn.Module):
    """The first head alone."""

    def __init__(self, inner: Heads) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return every_output(self.inner(x))[0]


def disturbed(teacher: Heads, scale: float = 2.0) -> Heads:
    """The teacher with another first head."""
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        noise = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
        student.a.weight.add_(scale * noise)
    return student


@torch.no_grad()
def error(student: nn.Module, teacher: nn.Module, head: int) -> float:
    """KL divergence of one head."""
    p, q = (every_output(m(X))[head].log_softmax(1) for m in (teacher, student))
    return float((p.exp() * (p - q)).sum(1).mean())


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# what is an output


def test_outputs_beside_the_first_are_floats_of_as_many_examples() -> None:
    a, b, one = draw(0, 3, 5), draw(1, 3, 2), draw(2, 3)
    codes, aside, whole = torch.zeros(3, 2, dtype=torch.int64), draw(3, 7, 2), torch.tensor(1.0)
    found = beside((a, None, b, codes, aside, whole, (b,), one), a)
    assert [tuple(x.shape) for x in found] == [(3, 2), (3, 1)]
    assert found[0] is b
    assert beside({"loss": whole, "b": b, "logits": a}, a) == [b]
    assert beside(a, a) == []
    assert [tuple(x.shape) for x in every_output((a, draw(1, 3, 2, 4, 4)))] == [
        (3, 5), (3, 4, 4, 2)
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["tuple", "list", "dict"])
def test_all_outputs_are_seen_and_shown(form: str) -> None:
    module = Heads(form)
    with watch(module) as see:
        seen = see(X[:3])
        again = Seen(**Shown(module, see)(X[:3]))
    a, b = module.a(module.body(X[:3])), module.b(module.body(X[:3]))
    for found in (seen, again):
        assert torch.equal(found.outputs, a)
        assert len(found.others) == 1
        assert torch.equal(found.others[0], b)


# losses


@pytest.mark.parametrize("text", ["logits", "topk:k=2", "relations:on=outputs", "outputs"])
def test_a_loss_is_the_mean_over_outputs(text: str) -> None:
    s, t = ([draw(i, 6, 5), draw(i + 1, 6, 3)] for i in (0, 2))
    lesson = Lesson.parse(text)
    alone = [float(lesson(Seen(x), Seen(y))[0]) for x, y in zip(s, t, strict=True)]
    both = lesson(Seen(s[0], others=(s[1],)), Seen(t[0], others=(t[1],)))
    assert float(both[0]) == pytest.approx(sum(alone) / 2)
    assert float(both[1][text.partition(":")[0]]) == pytest.approx(sum(alone) / 2)


def test_labels_are_of_the_first_output() -> None:
    s, t = (
        Seen(draw(0, 6, 5), others=(draw(1, 6, 3),)),
        Seen(draw(2, 6, 5), others=(draw(3, 6, 3),)),
    )
    labels = torch.tensor([0, 4, 2, 2, 1, 0])
    hard = Lesson.parse("labels")
    assert torch.equal(hard(s, None, labels)[0], hard(Seen(s.outputs), None, labels)[0])
    lesson = Lesson.parse("decoupled")
    first = lesson(Seen(s.outputs), Seen(t.outputs), labels)[0]
    second = lesson(Seen(s.others[0]), Seen(t.others[0]), t.others[0].argmax(1))[0]
    assert float(lesson(s, t, labels)[0]) == pytest.approx(float(first + second) / 2)


def test_each_output_trains_parts_of_its_own() -> None:
    s, t = (
        Seen(draw(0, 6, 5), others=(draw(1, 6, 3),)),
        Seen(draw(2, 6, 5), others=(draw(3, 6, 3),)),
    )
    lesson = Lesson.parse("contrastive:on=outputs:width=4")
    parts = lesson.start(s, t)
    assert set(parts) == {"contrastive", "contrastive_1"}
    assert float(parts(s, t)[0].detach()) > 0
    one = lesson.start(Seen(s.outputs), Seen(t.outputs))
    assert torch.equal(next(one.parameters()), next(parts["contrastive"].parameters()))


# judging and measuring


def test_every_measure_looks_at_all_outputs() -> None:
    teacher, student = (Network.of(m, X[:2]) for m in (Heads(), Heads()))
    with torch.no_grad():
        student.module.get_submodule("b").weight.mul_(3)
    first = outputs(teacher, X)
    assert torch.equal(outputs(student, X), first)
    found = measure_network(student, X, reference=teacher, resamples=2).as_dict()
    for name in ("mean_kld", "relative_error"):
        assert found[name]["value"] > 0  # type: ignore[index]
    kld = error(student.module, teacher.module, 1) / 2
    assert found["mean_kld"]["value"] == pytest.approx(kld, rel=1e-4)  # type: ignore[index]
    held = training_data(X, tested=True)
    assert Judge(teacher, held)(teacher.module) == 0 > Judge(teacher, held)(student.module)
    judge = Validation(teacher, student, X)
    assert judge.measure == "mean_kld"
    assert judge(student.module) == pytest.approx(-kld, rel=1e-4)
    numbers = Validation(teacher, student, X, logits=False)
    assert numbers.measure == "relative_error"
    wanted = found["relative_error"]["value"]  # type: ignore[index]
    assert numbers(student.module) == pytest.approx(-wanted, rel=1e-4)


def test_one_output_in_a_tuple_is_measured_as_a_tensor() -> None:
    a, b = draw(0, 50, 5), draw(1, 50, 5)
    assert (
        compare_outputs([a], reference=[b]).as_dict() == compare_outputs(a, reference=b).as_dict()
    )


def test_of_a_number_beside_classes_the_error_is_measured() -> None:
    teacher = Network.of(Heads(second=1), X[:2])
    ours, theirs = all_outputs(teacher, X), [x + 0.1 for x in all_outputs(teacher, X)]
    assert "mean_kld" not in compare_outputs(ours, reference=theirs).as_dict()
    labels = torch.arange(200) % 5
    found = compare_outputs(ours, labels, theirs).as_dict()
    assert {"accuracy", "relative_error"} <= set(found)
    judge = Judge(teacher, training_data((X, labels), tested=True))
    assert judge.measure == "accuracy"
    worse = copy.deepcopy(teacher.module)
    with torch.no_grad():
        worse.get_submodule("b").weight.mul_(3)
    assert judge(worse) < judge(teacher.module)


def test_a_teacher_that_looks_twice_answers_with_all_outputs() -> None:
    class Images(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x[:, 0, 0], x[:, 0, 1]

    x = draw(0, 3, 1, 2, 4)
    first, second = Mirrored(Images())(x)
    assert torch.allclose(first, (x[:, 0, 0] + x[:, 0, 0].flip(-1)) / 2)
    assert torch.allclose(second, (x[:, 0, 1] + x[:, 0, 1].flip(-1)) / 2)


# the verbs


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_a_second_output_is_not_ruined(form: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    teacher = Heads(form)
    with torch.no_grad():
        for head in (teacher.a, teacher.b):
            head.weight.mul_(6)  # sure of something
    student = disturbed(teacher)
    asked: dict[str, Any] = {"length": "100steps", "rate": 0.1}
    back = lighten.recover(student, teacher, X[:2], data=X, **asked)
    taught = lighten.distill(teacher, student, X, out=tmp_path / "run", **asked)
    alone = lighten.recover(First(student), First(teacher), X[:2], data=X, **asked)
    ruined = error(alone.network.module.inner, teacher, 1)  # type: ignore[arg-type]
    for module in (back.network.module, taught.module):
        assert error(module, teacher, 0) < 0.2 * error(student, teacher, 0)
        assert error(module, teacher, 1) < 0.2 * ruined
    assert back.metrics["measure"] == "mean_kld"
    assert taught.metrics["after"]["mean_kld"]["value"] > 0


def test_what_would_leave_an_output_untaught_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    teacher = Heads()
    data = (X, torch.arange(200) % 5)
    with pytest.raises(WrongUse, match="2 outputs, and `labels:1` teaches the first alone"):
        lighten.recover(teacher, teacher, X[:2], data=data, learn_from="labels:1", length="2steps")
    asked: dict[str, Any] = {"learn_from": "labels", "length": "2steps", "out": tmp_path / "a"}
    with pytest.raises(WrongUse, match="teaches the first alone"):
        lighten.distill(First(teacher), teacher, data, **asked)
    with pytest.raises(WrongUse, match="gives 2 outputs, its teacher 1"):
        lighten.distill(First(teacher), teacher, X, length="2steps", out=tmp_path / "b")
    with pytest.raises(WrongUse, match="gives 2 outputs, its teacher 1"):
        lighten.recover(teacher, First(teacher), X[:2], data=X, length="2steps")


def test_integers_learn_from_all_outputs() -> None:
    pytest.importorskip("lightning")
    from lighten.simulate import Simulation

    found = lighten.quantize(Heads(), X[:2], data=X, learn="2steps")
    assert len(Simulation(found)(X[:3])) == 2
