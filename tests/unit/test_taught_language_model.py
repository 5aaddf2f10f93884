"""What a language model that learns shows, and what its lessons compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lighten.errors import WrongUse
from lighten.language_student import LanguageModel
from lighten.lesson import Lesson, Seen
from lighten.measure import head_of
from lighten.model import Model, open_model
from lighten.sliced_lesson import SlicedLesson
from lighten.taught_language_model import TaughtLanguageModel
from lighten.watch import pairs, watch

Tiny = Callable[..., Path]
IDS = torch.arange(24).view(2, 12)


def models(tiny: Tiny, family: str = "llama") -> tuple[Model, Model]:
    count = "n_layer" if family == "gpt2" else "num_hidden_layers"
    return open_model(tiny(family, **{count: 4})), open_model(tiny(family, **{count: 2}, seed=3))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_leaves_the_blocks_is_seen_once_with_its_gradient(tiny: Tiny, family: str) -> None:
    large, small = models(tiny, family)
    teacher, student = LanguageModel(large, {}), TaughtLanguageModel(small)
    places = pairs(student, teacher, IDS)
    assert [s for s, _ in places] == ["ends.0", "ends.1"]
    assert [t for _, t in places] == ["ends.1", "ends.3"]
    with watch(student, ["ends.0"]) as see:
        seen = see(IDS)
        assert seen.hidden["ends.0"].shape == (2, 12, 64)
        seen.hidden["ends.0"].sum().backward()
    grads = {name: getattr(student, key).grad for name, key in student.names.items()}
    reached = {name for name, grad in grads.items() if grad is not None and bool(grad.any())}
    assert any(".0." in name for name in reached)
    assert not any(".1." in name for name in reached)


def test_all_weights_learn_ties_stay_and_training_mode_changes_nothing(tiny: Tiny) -> None:
    model = open_model(tiny("qwen2"))  # its head is its embedding
    student = TaughtLanguageModel(model)
    assert set(student.values()) == set(model.tensors)
    assert sum(p.numel() for p in student.parameters()) == model.parameters
    student.train()
    with torch.no_grad():
        first = student(IDS)
        for p in student.parameters():
            p.add_(0.01)
        moved = student(IDS)
    assert not torch.allclose(first, moved)
    assert student.head()[0] is student.module.get_input_embeddings().weight  # type: ignore[operator]


def test_losses_inside_are_added_to_those_of_the_outputs(tiny: Tiny) -> None:
    large, small = models(tiny)
    teacher, student = LanguageModel(large, {}), TaughtLanguageModel(small)
    like = head_of(large, *teacher.head())
    labels = IDS.clone()

    def value(lesson: str) -> tuple[torch.Tensor, dict[str, Any]]:
        sliced = SlicedLesson(Lesson.parse(lesson), student.head, like, inside=True)
        places = pairs(student, teacher, IDS)
        with watch(student, [s for s, _ in places]) as mine, torch.no_grad():
            s = mine(IDS)
        with watch(teacher, [t for _, t in places]) as theirs, torch.no_grad():
            t = theirs(IDS)
            t = Seen(t.outputs, {a: t.hidden[b] for a, b in places})
            return sliced(s, t, labels, sliced.start(s, t))

    both, parts = value("logits:2,hidden:3,labels:0.5")
    assert set(parts) == {"logits", "hidden", "labels"}
    alone = [value(name)[0] for name in ("logits", "hidden", "labels")]
    assert torch.isclose(both, 2 * alone[0] + 3 * alone[1] + 0.5 * alone[2])


@pytest.mark.parametrize("lesson", ["attention", "contrastive", "hidden,attention_transfer"])
def test_lessons_that_are_not_for_text_are_refused(lesson: str) -> None:
    with pytest.raises(WrongUse, match="not kept"):
        SlicedLesson.check(Lesson.parse(lesson), inside=True)
    with pytest.raises(WrongUse, match="hidden"):
        SlicedLesson.check(Lesson.parse("hidden"))
