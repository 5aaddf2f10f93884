"""Teach any student by any teacher, on the one loop of lighten.learn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lighten.errors import BadInput
from lighten.graph_norms import has_norms, learning_norms
from lighten.learn import Learned, learn
from lighten.learning_numbers import check_numbers
from lighten.length import Length
from lighten.lesson import Lesson
from lighten.mirrored import mirrors
from lighten.network import Network
from lighten.optimizers import usual_rate
from lighten.recover import BATCH, CLIP, FEWEST, teaching
from lighten.showing import Showing
from lighten.training_data import TrainingData


@dataclass(frozen=True)
class Hyperparameters:
    """How a student is trained; see lighten.learn.learn. rate None: the optimizer's usual one."""

    rate: float | None = None
    batch: int = BATCH
    optimizer: str = "sgd"
    patience: int | None = None
    average: float | None = None
    mirrored: bool | None = None
    clip: float | None = CLIP
    accumulate: int = 1
    precision: str = "auto"
    accelerator: str = "auto"
    devices: int | str = 1
    seed: int = 0

    @property
    def rate_used(self) -> float:
        return usual_rate(self.optimizer) if self.rate is None else self.rate

    def check(self) -> None:
        """Raises WrongUse for numbers that cannot be."""
        check_numbers(
            rate=self.rate_used, batch=self.batch, accumulate=self.accumulate,
            patience=self.patience, average=self.average, clip=self.clip,
        )  # fmt: skip


def teach(
    student: Network,
    teacher: Network,
    data: TrainingData,
    lesson: Lesson,
    validation: Callable[[nn.Module], float],
    length: Length,
    how: Hyperparameters,
    folder: Path | None = None,
    name: str = "distill",
) -> tuple[Network, Learned]:
    """A copy of the student in the best state seen on held-out data, the one given included.

    Norms over the batch see batches and learn their statistics. Raises UserError.
    """
    batch = batch_of(student, data, how)
    twice = mirrors(how.mirrored, teacher, lesson, data.course)
    found = student.with_module(copy.deepcopy(student.module))
    module = found.module
    trained = [p for p in module.parameters() if p.is_floating_point()]
    for parameter in trained:
        parameter.requires_grad_(True)
    with learning_norms(module):
        learned = learn(
            module, teaching(teacher, lesson, twice) if lesson.taught else None, lesson,
            data.course, length=length, rate=how.rate_used, batch=batch, evaluate=validation,
            folder=folder, seed=how.seed, optimizer=how.optimizer, patience=how.patience,
            average=how.average, clip=how.clip, accumulate=how.accumulate, precision=how.precision,
            accelerator=how.accelerator, devices=how.devices, name=name,
        )  # fmt: skip
    for parameter in trained:
        parameter.requires_grad_(False)
        parameter.grad = None
    return found, learned


def batch_of(student: Network, data: TrainingData, how: Hyperparameters) -> int:
    """Examples in a batch; raises BadInput where batch norms would see too few."""
    batch = min(how.batch, data.course.count)
    if batch // how.accumulate < FEWEST and has_norms(student.module):
        raise BadInput(
            f"a batch of {batch // how.accumulate} examples is too small: the student has batch"
            " norms",
            f"at least {FEWEST} in each part of a batch: more data, or a larger batch",
        )
    return batch


@torch.no_grad()
def check_lesson(
    student: Network, teacher: Network, lesson: Lesson, inputs: Tensor, labels: Tensor | None
) -> None:
    """Teach a few examples without learning; raises WrongUse or BadInput where the two networks
    cannot be compared as the lesson says, before anything is computed."""
    from contextlib import nullcontext

    for network in (student, teacher):
        network.check_inputs()
    inputs = inputs.to(student.device)
    labels = None if labels is None else labels.to(student.device)
    taught = teacher.module if lesson.taught else None
    showing = Showing(student.module, taught, lesson, inputs, nullcontext)
    try:
        parts = showing.parts(inputs, 0)
        parts(showing.student(inputs), showing.taught(inputs), labels)
    finally:
        showing.close()
