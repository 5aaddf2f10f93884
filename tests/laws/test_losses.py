"""Laws that every registered loss keeps; a new one inherits them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lighten.lesson import Lesson, Parts, Seen
from lighten.registry import losses

BATCH, CLASSES = 7, 6
NAMES = sorted(losses)
# options that change what is computed, beside the defaults
VARIANTS = {
    "attention": ["metric=mse"],
    "contrastive": ["on=outputs", "width=5"],
    "decoupled": ["temperature=1:beta=8", "target=teacher"],
    "hidden": ["project=least_squares", "channels=last"],
    "labels": ["smoothing=0.1"],
    "logits": ["temperature=4", "direction=reverse", "direction=js:temperature=2"],
    "relations": ["on=outputs", "angle=0", "distance=0"],
    "topk": ["k=3", "k=100"],
}
TEXTS = [*NAMES, *(f"{name}:{v}" for name in NAMES for v in VARIANTS.get(name, []))]
each = pytest.mark.parametrize("text", TEXTS)
BRAIN_FLOAT = torch.bfloat16


def seen(seed: int, width: int = 8, heads: int = 2, scale: float = 1.0) -> Seen:
    """What a network shows that has images, tokens and vectors inside."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return scale * torch.randn(*shape, generator=g)

    return Seen(
        draw(BATCH, CLASSES),
        {"images": draw(BATCH, width, 5, 5), "tokens": draw(BATCH, 4, 2 * width)},
        {"layer": draw(BATCH, heads, 4, 4).softmax(-1)},
    )


def labels(seed: int = 9) -> Tensor:
    return torch.randint(CLASSES, (BATCH,), generator=torch.Generator().manual_seed(seed))


def live(shown: Seen) -> Seen:
    return shown.each(lambda x: x.clone().requires_grad_())


def tensors(shown: Seen) -> list[Tensor]:
    return [shown.outputs, *shown.hidden.values(), *shown.attention.values()]


def value(text: str, student: Seen, teacher: Seen, target: Tensor | None = None) -> Tensor:
    lesson = Lesson.parse(text)
    parts = lesson.start(student, teacher)
    return lesson(student, teacher, labels() if target is None else target, parts)[0]


def slopes(total: Tensor, shown: Seen) -> list[Tensor]:
    found = torch.autograd.grad(total, tensors(shown), allow_unused=True)
    return [g for g in found if g is not None]


@each
def test_it_says_what_it_is(text: str) -> None:
    loss = Lesson.parse(text).terms[0].loss
    assert type(loss).__doc__
    assert loss.source
    assert loss.needs <= {"labels", "hidden", "attention"}
    assert loss.floor in (0.0, None)
    assert loss.taught or "labels" in loss.needs
    assert str(Lesson.parse(str(Lesson.parse(text)))) == str(Lesson.parse(text))


@each
def test_equal_networks_have_the_least(text: str) -> None:
    """0 where a floor is registered; else at least less than networks that do not agree have."""
    teacher = seen(1, scale=3 if text.startswith("labels") else 1)
    target = teacher.outputs.argmax(1)
    equal = value(text, teacher, teacher, target).detach()
    other = value(text, seen(2), teacher, target).detach()
    if Lesson.parse(text).terms[0].loss.floor == 0.0:
        assert abs(float(equal)) < 1e-6
    assert float(equal) < 0.9 * float(other)


@each
def test_it_is_a_positive_scalar_with_a_finite_gradient_that_is_not_zero(text: str) -> None:
    student = live(seen(2))
    total = value(text, student, seen(1))
    assert total.dim() == 0
    assert float(total.detach()) > 0
    found = slopes(total, student)
    assert found
    assert all(torch.isfinite(g).all() for g in found)
    assert sum(float(g.abs().sum()) for g in found) > 1e-6


@each
def test_the_gradient_at_equality_is_finite(text: str) -> None:
    student = live(seen(1))
    assert all(torch.isfinite(g).all() for g in slopes(value(text, student, seen(1)), student))


@each
def test_a_step_down_the_gradient_brings_it_down(text: str) -> None:
    student, teacher = live(seen(2)), seen(1)
    lesson = Lesson.parse(text)
    parts = lesson.start(student, teacher)
    total = lesson(student, teacher, labels(), parts)[0]
    grads = torch.autograd.grad(total, tensors(student), allow_unused=True)
    size = torch.stack([g.norm() for g in grads if g is not None]).norm()
    moved = iter(
        x if g is None else x - 1e-2 * g / size
        for x, g in zip(tensors(student), grads, strict=True)
    )
    after = lesson(student.each(lambda _: next(moved).detach()), teacher, labels(), parts)[0]
    assert float(after.detach()) < float(total.detach())


@each
def test_the_order_of_the_batch_does_not_matter(text: str) -> None:
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(5))
    student, teacher = seen(2), seen(1)
    lesson = Lesson.parse(text)
    parts = lesson.start(student, teacher)
    before = lesson(student, teacher, labels(), parts)[0]
    mixed = [s.each(lambda x: x[order]) for s in (student, teacher)]
    after = lesson(*mixed, labels()[order], parts)[0]
    assert torch.allclose(before, after, rtol=1e-4)


@each
def test_the_teacher_gets_no_gradient_and_nothing_is_changed(text: str) -> None:
    student, teacher = live(seen(2)), live(seen(1))
    value(text, student, teacher).backward()
    assert all(x.grad is None for x in tensors(teacher))
    for now, then in ((student, seen(2)), (teacher, seen(1))):
        assert all(torch.equal(a, b) for a, b in zip(tensors(now), tensors(then), strict=True))


@each
@pytest.mark.parametrize("scale", [1e4, 1e-6, 0.0])
def test_outputs_of_any_size_are_numbers(text: str, scale: float) -> None:
    """One-hot probabilities, next to none, and networks that are dead."""
    student = seen(2, scale=scale)
    student = live(replace(student, attention=seen(2).attention))
    total = value(text, student, replace(seen(1, scale=scale), attention=seen(1).attention))
    assert torch.isfinite(total)
    assert float(total.detach()) > -1e-6  # sums of logarithms round
    assert all(torch.isfinite(g).all() for g in slopes(total, student))


@each
def test_certain_maps_and_masked_classes_are_numbers(text: str) -> None:
    """Attention on one key only; logits of -infinity, as masks make them."""
    if "smoothing" in text:
        pytest.skip("smoothing asks for a little of the masked class too: that is infinite")
    one = torch.eye(4).expand(BATCH, 2, 4, 4)
    mask = torch.zeros(CLASSES)
    mask[2] = -torch.inf
    if "on=outputs" in text:
        mask[2] = 0  # an embedding has no masks
    student = replace(seen(2), attention={"layer": one.roll(1, -1)})
    student = live(replace(student, outputs=student.outputs + mask))
    teacher = replace(seen(1), attention={"layer": one})
    teacher = replace(teacher, outputs=teacher.outputs + mask)
    total = value(text, student, teacher, torch.zeros(BATCH, dtype=torch.int64))
    assert torch.isfinite(total)
    assert all(torch.isfinite(g).all() for g in slopes(total, student))


@each
def test_bfloat16_and_autocast_come_near_float32(text: str) -> None:
    exact = float(value(text, seen(2), seen(1)).detach())
    half = [seen(i).each(lambda x: x.to(BRAIN_FLOAT)) for i in (2, 1)]
    student = live(half[0])
    total = value(text, student, half[1])
    assert total.dtype == torch.float32
    assert float(total.detach()) == pytest.approx(exact, rel=0.05)
    assert all(torch.isfinite(g).all() for g in slopes(total, student))
    with torch.autocast("cpu", torch.bfloat16):
        assert float(value(text, seen(2), seen(1)).detach()) == pytest.approx(exact, rel=1e-5)


@each
def test_one_example_is_a_batch_too(text: str) -> None:
    one = [live(seen(i).each(lambda x: x[:1])) for i in (2, 1)]
    total = value(text, *one, labels()[:1])
    assert torch.isfinite(total)
    assert all(torch.isfinite(g).all() for g in slopes(total, one[0]))


@each
def test_networks_of_other_widths_can_be_compared_where_the_loss_says_so(text: str) -> None:
    teacher = seen(1)
    if text.startswith("blocks"):
        pytest.skip("blocks have one shape")
    student = live(seen(2, width=5, heads=3))
    lesson = Lesson.parse(text)
    parts = lesson.start(student, teacher, seed=3)
    again = lesson.start(student, teacher, seed=3)
    total = lesson(student, teacher, labels(), parts)[0]
    assert torch.isfinite(total)
    assert torch.equal(total, lesson(student, teacher, labels(), again)[0])
    assert torch.equal(total, parts(student, teacher, labels())[0])
    assert slopes(total, student)


@each
def test_what_it_trains_learns(text: str) -> None:
    student, teacher = seen(2, width=5), seen(1, width=5)
    if text.startswith(("hidden", "contrastive")):
        teacher = seen(1)
    lesson = Lesson.parse(text)
    parts = lesson.start(student, teacher)
    assert isinstance(parts, Parts)
    trained = [p for p in parts.parameters() if p.requires_grad]
    if not trained:
        return
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    values = []
    for _ in range(20):
        total = lesson(student, teacher, labels(), parts)[0]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(float(total.detach()))
    assert values[-1] < 0.95 * values[0]


def test_every_loss_is_here() -> None:
    assert set(VARIANTS) <= set(NAMES)
    assert {"logits", "labels", "hidden", "blocks", "topk"} <= set(NAMES)
