"""The one loop in which a student learns: from a teacher, from labels, or both.

    learned = learn(student, teacher, Lesson.parse("logits:1"), course, length="10epochs",
                    rate=0.05, batch=128, evaluate=accuracy, folder=Path("run"))

Every step depends on the seed and its number alone, so a training that was killed goes on, by the
same call, to the same result: on a CPU to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lighten.allocator import kept_memory
from lighten.borrowed import borrowed
from lighten.course import Course
from lighten.devices import start_fabric
from lighten.errors import WrongUse
from lighten.feed import feed_of
from lighten.learning_numbers import check_numbers
from lighten.learning_rate import WARM_UP
from lighten.length import Length as Length
from lighten.lesson import Lesson
from lighten.optimizers import Grouped, grouped
from lighten.samples import digest
from lighten.training import Hook as Hook
from lighten.training import Training


@dataclass(frozen=True)
class Learned:
    """What a training did; the student itself holds its best state.

    history: rows {step, loss, each loss by name, rate, held_out where it was evaluated}: losses are
    means since the row before. best, first: evaluate's values of the best state and of the one that
    was given, equal where nothing better was found. steps: made, of `planned`. seconds: since this
    call began. broke: why it ended where a loss was not finite and that was accepted, else "".
    """

    history: list[dict[str, Any]] = field(repr=False)
    best: float
    first: float
    best_step: int
    steps: int
    planned: int
    seconds: float
    broke: str = ""


def learn(
    student: nn.Module,
    teacher: Callable[[Any], Any] | None,
    lesson: Lesson,
    data: Course | Iterable[Any],
    *,
    length: Length | str,
    rate: float,
    batch: int,
    evaluate: Callable[[nn.Module], float],
    folder: Path | None = None,
    seed: int = 0,
    optimizer: str = "sgd",
    weight_decay: float | None = None,
    group: Grouped = grouped,
    warm_up: float = WARM_UP,
    clip: float | None = None,
    accumulate: int = 1,
    average: float | None = None,
    patience: int | None = None,
    every: int | None = None,
    save_every: int | None = None,
    minutes: float = 2.0,
    precision: str = "auto",
    accelerator: str = "auto",
    devices: int | str = 1,
    strategy: Any = "auto",
    penalty: Callable[[], Tensor] | None = None,
    keep_given: bool = True,
    accept_broken: bool = False,
    before_step: Sequence[Hook] = (),
    after_step: Sequence[Hook] = (),
    given: Mapping[str, Any] | None = None,
    name: str = "learn",
) -> Learned:
    """Train `student` in place; at the end it holds the best state seen, the given one included
    (unless `keep_given` is False: the caller then judges it by data that neither state has seen).

    teacher: called without gradients on the same inputs (a module: in evaluation mode), None where
    the lesson needs none. data: a Course, or an iterable of (inputs, labels) that can be gone
    through again; `batch` then is what it gives. evaluate: of data that is not learned from, higher
    is better; called every `every` steps (an epoch, at most a fifth of all).
    patience: evaluations without a better one after which it stops. average: decay of a moving
    average of the weights, evaluated too. clip: largest norm of the gradient. accumulate: parts
    that a batch is computed in. penalty: added to the loss; one with a `step` (see
    lighten.group_lasso) takes it after each of the optimizer, a proximal one instead. folder: of
    checkpoints (after each evaluation, every `save_every` steps and every `minutes`), history.jsonl
    and TensorBoard.
    precision: "32-true", "bf16-mixed", "auto". devices, strategy: as Lightning Fabric has them
    ("ddp" with devices=2 runs the calling script once more), "fsdp" spreads weights, gradients and
    the optimizer's state over them (lighten.sharding). before_step is called with the steps done so
    far, after_step, while gradients are still there, with one more. given: what else the result
    depends on; what lies in `folder` goes on only where that, and all above, is the same.

    Raises WrongUse, BadInput (data that ends early, labels out of range, a network or data that is
    not finite before anything was learned), BadOutput where a loss is not finite later (the student
    then holds the best state before; with accept_broken the training ends there, and `broke` says
    why), MissingPackage without `lightning`.
    """
    began = time.monotonic()
    check_numbers(rate=rate, batch=batch, accumulate=accumulate, patience=patience, average=average,
                  clip=clip)  # fmt: skip
    if lesson.taught and teacher is None:
        raise WrongUse(f"the lesson `{lesson}` needs a teacher", "or learn from `labels` alone")
    fabric = start_fabric(precision, accelerator, devices, strategy)
    feed = feed_of(data, batch, accumulate, seed, fabric.global_rank, fabric.world_size)
    steps = Length.parse(length).steps(feed.per_epoch)
    every = max(1, min(feed.per_epoch or steps, steps // 5)) if every is None else every
    request = {
        "steps": steps, "rate": rate, "batch": batch, "seed": seed, "optimizer": optimizer,
        "weight_decay": weight_decay, "warm_up": warm_up, "clip": clip, "accumulate": accumulate,
        "average": average, "patience": patience, "every": every,
        "keep_given": keep_given, "lesson": str(lesson),
        "precision": str(fabric._precision.precision), "processes": fabric.world_size,
        "count": getattr(data, "count", None), "augment": getattr(data, "augment", None),
        "given": dict(given or {}), "student": digest(*student.state_dict().values()),
    }  # fmt: skip
    gpus = [fabric.device.index or 0] if fabric.device.type == "cuda" else []
    networks = [each for each in (student, teacher) if isinstance(each, nn.Module)]
    with torch.random.fork_rng(devices=gpus), borrowed(*networks):
        training = Training(
            fabric, student, teacher, lesson, feed, evaluate, steps, every, rate, seed, warm_up,
            clip, patience, penalty, keep_given, before_step, after_step, save_every, 60 * minutes,
            accept_broken,
        )  # fmt: skip
        try:
            with kept_memory():
                training.begin(optimizer, weight_decay, group, average, folder, request)
                training.go(name)
        finally:
            training.end()
    return Learned(
        training.history, training.best, training.first, training.best_step, training.step, steps,
        time.monotonic() - began, training.broke,
    )  # fmt: skip
