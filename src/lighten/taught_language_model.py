"""A language model all of whose weights learn, and its training on the one loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lighten.devices import best_precision, chosen
from lighten.divergence import Head
from lighten.language_student import LanguageModel, insert
from lighten.learn import Learned, learn
from lighten.length import Length
from lighten.lesson import Lesson
from lighten.measure import head_of
from lighten.model import Model
from lighten.run import Run
from lighten.sliced_lesson import SlicedLesson
from lighten.stored_teacher import answering
from lighten.teach import Hyperparameters
from lighten.text_course import TextCourse
from lighten.watched import Watched


class TaughtLanguageModel(LanguageModel):
    """`model` in float32; every weight learns. Blocks are gradient checkpoints where memory is
    short."""

    def __init__(self, model: Model, device: torch.device | str = "cpu") -> None:
        super().__init__(model, {}, device)
        self.names: dict[str, str] = {}
        for name, parameter in list(self.module.named_parameters()):
            self.names[name] = name.replace(".", "/")
            parameter.requires_grad_(True)
            self.register_parameter(self.names[name], parameter)
        insert(self.module, model.blocks, self)

    def values(self) -> dict[str, Tensor]:
        """State-dict name -> what it has learned, float32 on the CPU."""
        return {name: getattr(self, key).detach().cpu() for name, key in self.names.items()}


@dataclass(frozen=True, eq=False)
class School:
    """A teacher, what is learned from, and what the best state is chosen by.

    own: the student's head, for what it does to logits. windows: (count, length) token ids.
    planned: windows that are learned from in all, repeats counted.
    """

    run: Run
    teacher: LanguageModel
    like: Head
    own: Head
    windows: Tensor
    watched: Watched
    planned: int

    @classmethod
    def of(
        cls, run: Run, teacher: Model, student: Model, windows: Tensor, watched: Tensor,
        planned: int, accelerator: str,
    ) -> School:  # fmt: skip
        """The teacher is loaded whole, and run on what is watched."""
        device = torch.device(chosen(accelerator))
        running = LanguageModel(teacher, {}, device)
        like = head_of(teacher, *running.head())
        own = head_of(student, like.weight, None)
        return cls(run, running, like, own, windows, Watched(running, watched, like, own), planned)

    def teach(
        self, student: Model, lesson: Lesson, length: Length, how: Hyperparameters,
        evaluate: Callable[[nn.Module], float] | None = None, folder: Path | None = None,
        name: str = "distill",
    ) -> tuple[Mapping[str, Tensor], Learned]:  # fmt: skip
        """(what each weight has learned, at its best on what is watched; how it went)."""
        device = self.like.weight.device
        learner = TaughtLanguageModel(student, device)
        precision = best_precision(how.precision, device.type)
        sliced = SlicedLesson(lesson, learner.head, self.like, precision, self.own, inside=True)
        teacher = None
        if lesson.taught:
            teacher = answering(
                self.run, lesson.terms, self.teacher, self.like, self.windows, self.planned
            )
        learned = learn(
            learner, teacher, sliced, TextCourse(self.windows),  # type: ignore[arg-type]
            length=length, rate=how.rate_used, batch=min(how.batch, len(self.windows)),
            evaluate=evaluate or self.watched, folder=folder, seed=how.seed,
            optimizer=how.optimizer, patience=how.patience, average=how.average, clip=how.clip,
            accumulate=how.accumulate, precision=precision, accelerator=how.accelerator, name=name,
        )  # fmt: skip
        return learner.values(), learned
