"""Language models as the loop calls them, lessons in slices, stored teachers, windows of text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lighten import sliced_lesson, stored_teacher
from lighten.calibrate import Stream
from lighten.divergence import Head
from lighten.errors import BadInput, NoRoom, UnknownName, WrongUse
from lighten.language_student import LanguageModel, LanguageStudent
from lighten.lesson import Lesson
from lighten.model import open_model
from lighten.recover_language import wish
from lighten.registry import formats
from lighten.run import Run
from lighten.seen import Seen
from lighten.sliced_lesson import SlicedLesson, logits
from lighten.solve import Dense
from lighten.stored_teacher import StoredTeacher
from lighten.text_course import TextCourse
from lighten.types import Compressed, Spec

Tiny = Callable[..., Path]
IDS = torch.arange(48).view(2, 24) % 200 + 5


def rounded(model: Any, name: str = "q4_0") -> dict[str, Compressed]:
    """Every layer that the format fits, rounded to nearest."""
    found = {}
    for layer in model.layers:
        w, format = model.weight(layer), formats[name]
        if format.accepts(layer.shape) is None and layer.kind != "positions":
            grid = format.fit(w)
            parts = format.pack(format.encode(w, grid), grid)
            found[layer.name] = Compressed(Spec(format=name), layer.shape, format, parts)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen2"])
def test_a_student_computes_what_the_stream_does_and_its_gradients_are_whole(
    tiny: Tiny, family: str
) -> None:
    model = open_model(tiny(family))
    weights = rounded(model)
    student = LanguageStudent(model, weights)
    student.train()  # the loop does: no dropout may come of it
    stream = Stream(model, IDS, weights=Dense(weights)).through()
    expected = torch.stack(list(stream.outputs()))
    found = student(IDS)
    assert torch.allclose(found, expected, atol=1e-4)
    weight, _ = student.head()
    assert torch.equal(weight, stream.head[0])
    (found.square().sum() + weight.square().sum()).backward()
    assert len(student.learned) == len(weights)
    for name, p in student.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
    frozen, vectors = student.freeze()
    assert all(torch.equal(frozen[n].dense(), w.dense()) for n, w in weights.items())
    assert all(torch.equal(v, model.tensors[n].load()) for n, v in vectors.items())


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("text", ["logits:1", "logits:1:temperature=2,labels:0.5", "topk:2:k=5"])
def test_in_slices_it_is_the_same_lesson(
    monkeypatch: pytest.MonkeyPatch, text: str, softcap: float | None
) -> None:
    monkeypatch.setattr(sliced_lesson, "LOGITS", 3 * 40)  # three positions at a time
    torch.manual_seed(0)
    hidden = torch.randn(2, 8, 16, requires_grad=True)
    weight = torch.randn(40, 16, requires_grad=True)
    theirs, like = torch.randn(2, 8, 16), Head(torch.randn(40, 16), None, softcap, 0.5)
    labels = torch.randint(40, (2, 8))
    lesson = Lesson.parse(text)
    whole, parts = lesson(
        Seen(logits(hidden, weight, None, like)),
        Seen(logits(theirs, like.weight, None, like)),
        labels,
    )
    expected = torch.autograd.grad(3 * whole, [hidden, weight])
    sliced = SlicedLesson(lesson, lambda: (weight, None), like)
    total, values = sliced(Seen(hidden), Seen(theirs), labels)
    assert torch.allclose(total, whole, rtol=1e-5)
    assert all(torch.allclose(values[name], parts[name], rtol=1e-5) for name in parts)
    for found, wanted in zip(
        torch.autograd.grad(3 * total, [hidden, weight]), expected, strict=True
    ):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(sliced(Seen(hidden), Seen(theirs), labels)[0], whole, rtol=1e-5)


def test_products_in_bfloat16_leave_the_heads_gradient_in_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sliced_lesson, "LOGITS", 2 * 40)
    torch.manual_seed(0)
    hidden = torch.randn(2, 64, 16, requires_grad=True)
    weight = torch.randn(40, 16, requires_grad=True)
    theirs, like = torch.randn(2, 64, 16), Head(torch.randn(40, 16))
    lesson, found = Lesson.parse("logits:1"), {}
    for precision in ("32-true", "bf16-mixed"):
        sliced = SlicedLesson(lesson, lambda: (weight, None), like, precision)
        total, _ = sliced(Seen(hidden), Seen(theirs))
        found[precision] = (total, *torch.autograd.grad(total, [hidden, weight]))
    for whole, half in zip(found["32-true"], found["bf16-mixed"], strict=True):
        assert half.dtype == torch.float32
        assert (whole - half).norm() < 0.02 * whole.norm()
        assert not torch.equal(whole, half)
    assert like.weight.dtype == torch.float32


def test_what_a_language_model_cannot_learn_from() -> None:
    assert wish(None, None) == {}
    assert wish("500 steps", None) == {"recover": "500steps", "learn_from": "logits:1"}
    with pytest.raises(WrongUse, match="hidden"):
        wish("5steps", "logits:1,hidden:0.1")
    with pytest.raises(WrongUse, match="without recover"):
        wish(None, "logits:1")
    with pytest.raises(UnknownName, match="logits"):
        wish("5steps", "logit:1")
    with pytest.raises(WrongUse, match="5days"):
        wish("5days", None)


def test_a_stored_teacher_answers_as_the_running_one(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_teacher, "SHARD", 1)
    model = open_model(tiny("llama"))
    teacher = LanguageModel(model, {})
    weight, bias = teacher.head()
    head = Head(weight.detach(), bias)
    with Run.open(tmp_path / "run", {}) as run:
        stored = StoredTeacher(run, IDS, 7, len(weight)).fill(teacher, head)
        found = stored(IDS[[1]])
        with torch.no_grad():
            whole = logits(teacher(IDS[[1]]), head.weight, bias, head).log_softmax(-1)
        assert found.indices is not None
        assert torch.equal(found.indices, whole.topk(7).indices)
        assert torch.allclose(found.outputs, whole.topk(7).values, atol=5e-3)
        size = sum(p.stat().st_size for p in run.path("teacher").iterdir())
        assert stored.nbytes <= size <= stored.nbytes + 400  # two headers

        run.path("teacher/1.safetensors").unlink()  # a stopped pass: what is there stays
        asked: list[int] = []

        def counted(ids: torch.Tensor) -> torch.Tensor:
            asked.append(len(ids))
            return teacher(ids)

        again = StoredTeacher(run, IDS, 7, len(weight)).fill(counted, head)
        assert asked == [1]
        assert torch.equal(again(IDS[[1]]).outputs, found.outputs)
        with pytest.raises(BadInput, match="not asked about"):
            stored(IDS[[0]] + 1)
        with pytest.raises(WrongUse, match="likeliest"):
            StoredTeacher(run, IDS, 0, len(weight))


def test_a_stored_teacher_that_does_not_fit_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> Any:
        raise AssertionError("the teacher was run")

    with Run.open(tmp_path / "run", {}) as run:
        stored = StoredTeacher(run, IDS, 64, 1000)
        assert stored.nbytes == 48 * 64 * 4
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Disk", (), {"free": 1000}))
        with pytest.raises(NoRoom, match="are free"):
            stored.fill(none, Head(torch.zeros(1000, 4)))


def test_windows_are_examples_and_their_labels_the_next_tokens() -> None:
    course = TextCourse(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    ids, labels = course.batch(torch.tensor([1]), torch.Generator())
    assert course.count == 2
    assert ids.tolist() == [[4, 5, 6]]
    assert labels.tolist() == [[5, 6, -100]]
    with pytest.raises(BadInput, match="one window"):
        TextCourse(torch.zeros(0, 8, dtype=torch.long))
