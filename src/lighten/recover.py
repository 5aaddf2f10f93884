"""Recovery: a compressed network learns from the one that it was made of.

found = recover(small, network, training_data(images), length="10epochs")
found.network, found.metrics["best"]
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lighten.borrowed import own_copy
from lighten.errors import BadInput, UserError, WrongUse
from lighten.graph_norms import has_norms, learning_norms
from lighten.heads import classes_last
from lighten.intervals import by_chance
from lighten.learn import Learned, learn
from lighten.learning_numbers import check_numbers
from lighten.length import Length
from lighten.lesson import Lesson
from lighten.mirrored import Mirrored, mirrors
from lighten.network import Network
from lighten.network_quality import all_outputs, measure_network
from lighten.optimizers import usual_rate
from lighten.progress import note
from lighten.registry import transforms
from lighten.samples import Samples
from lighten.seen import IGNORED, INSIDE
from lighten.training_data import TrainingData, of_samples
from lighten.usual_lesson import check_student, lesson_for
from lighten.weight_masks import WeightMasks

BATCH = 128
FEWEST = 8
"""Examples in a batch that statistics of a batch norm can be taken from at least."""

CLIP = 5.0


@dataclass(frozen=True, eq=False)
class Recovered:
    """network: as it was best on data held out. metrics: {"length", "learn_from", "rate", "steps",
    "best_step", "examples", "held_out", "measure", "before", "after", "minutes"}: before and after
    are accuracy (of labels), mean_kld (from the teacher, in nats) or relative_error (`measure` says
    which), on the held-out part of the training data; "broke" where learning broke down, which was
    accepted."""

    network: Network
    metrics: dict[str, Any]
    learned: Learned

    def _repr_html_(self) -> str:
        from lighten.report import notebook

        return notebook.of_rows("On data held out", self._rows())

    def __rich__(self) -> Any:
        from lighten.report.terminal import Records

        return Records.of("On data held out", self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        shown = ("measure", "before", "after", "learn_from", "steps", "best_step", "minutes")
        return [{key: self.metrics[key] for key in shown}]


def recover(
    network: Network,
    teacher: Network,
    data: TrainingData | Samples,
    *,
    length: str | Length = "10epochs",
    learn_from: str | Lesson | None = None,
    rate: float | None = None,
    batch: int = BATCH,
    optimizer: str = "sgd",
    masks: Mapping[str, Tensor] | None = None,
    patience: int | None = None,
    average: float | None = None,
    mirrored: bool | None = None,
    clip: float | None = CLIP,
    accumulate: int = 1,
    precision: str = "auto",
    accelerator: str = "auto",
    devices: int | str = 1,
    strategy: Any = "auto",
    folder: Path | None = None,
    seed: int = 0,
    keep_given: bool = True,
    accept_broken: bool = False,
) -> Recovered:
    """Let a network learn to do what its teacher does; it never comes back worse on held-out data.

    Norms over the batch see batches and learn their statistics, as when a network is trained.
    learn_from: the lesson; None: "logits:1", or "outputs:1" where outputs are no logits (see
    lighten.usual_lesson). data: without labels the best state is that of least KL divergence from
    the teacher, or of least relative error where outputs are no logits, over all outputs of a
    network that has several; with labels, which are of its first output, that of highest accuracy.
    masks: weight -> bool, of its shape; what is False stays zero.

    The original was most often trained on the same data as it now teaches on: what it remembers of
    it, held out here or not, the state that was given still has, and looks better by. Where other
    data is there to compare on, give it as the held-out part, or compare both on it and say
    keep_given=False: then the best trained state is taken, whether or not it is better.

    optimizer: "sgd", "adamw" or "muon". rate: None: its usual one, see lighten.optimizers.
    mirrored: the teacher answers with the mean over an image and its mirror image (None: where
    images are mirrored to learn from, and its logits are all that is looked at).

    For all else see lighten.learn.learn. `network` is not changed. Raises UserError.
    """
    check_numbers(rate=rate, batch=batch, accumulate=accumulate, patience=patience, average=average,
                  clip=clip)  # fmt: skip
    lesson = lesson_for(learn_from, teacher)
    check_student(network, teacher)
    data = of_samples(data) if isinstance(data, Samples) else data
    data.course.check(lesson.needs)
    for who, each in (("teacher", teacher), ("network", network)):
        _check_runs(who, each, data.held_out[:2])
    batch = min(batch, data.course.count)
    student = network.with_module(copy.deepcopy(network.module))
    module = student.module
    if batch // accumulate < FEWEST and has_norms(module):
        raise BadInput(
            f"a batch of {batch // accumulate} examples is too small: the network has batch norms",
            f"at least {FEWEST} in each part of a batch: more data, or a larger batch",
        )
    value = usual_rate(optimizer) if rate is None else rate
    trained = [p for p in module.parameters() if p.is_floating_point()]
    for parameter in trained:
        parameter.requires_grad_(True)
    twice = mirrors(mirrored, teacher, lesson, data.course)
    held = [] if not masks else [WeightMasks(module, masks)]
    evaluate = Judge(teacher, data, logits=not lesson.numbers)
    with learning_norms(module):
        learned = learn(
            module, teaching(teacher, lesson, twice), lesson, data.course, length=length,
            rate=value, batch=batch, evaluate=evaluate, folder=folder, seed=seed,
            optimizer=optimizer, patience=patience, average=average, clip=clip,
            accumulate=accumulate, precision=precision, accelerator=accelerator, devices=devices,
            strategy=strategy, after_step=held, keep_given=keep_given, accept_broken=accept_broken,
            given={"mirrored": twice, "teacher": teacher.digest, "data": data.digest},
            name="recover",
        )  # fmt: skip
    for parameter in trained:
        parameter.requires_grad_(False)
        parameter.grad = None
    if keep_given and learned.best_step == 0:
        note("recovery found nothing better on held-out data: the network stays as it was")
    metrics = {
        "length": str(Length.parse(length)), "learn_from": str(lesson),
        "optimizer": optimizer, "rate": value, "augment": data.course.augment, "mirrored": twice,
        "steps": learned.steps, "best_step": learned.best_step, "examples": data.course.count,
        "held_out": len(data.held_out), "measure": evaluate.measure,
        "before": evaluate.shown(learned.first), "after": evaluate.shown(learned.best),
        "minutes": round(learned.seconds / 60, 2), **broken(learned),
    }  # fmt: skip
    return Recovered(student, metrics, learned)


def _check_runs(who: str, network: Network, x: Tensor) -> None:
    """Raises WrongUse where a network cannot be called with examples of this shape."""
    try:
        network(x.to(network.device))
    except UserError:
        raise
    except Exception as error:  # a forward may fail in any way it likes
        raise WrongUse(
            f"the {who} does not run on examples {tuple(x.shape[1:])}:"
            f" {type(error).__name__}: {error}",
            f"it was made for {tuple(network.inputs[0].shape[1:])}: give data of that shape",
        ) from error


def broken(learned: Learned) -> dict[str, str]:
    """What metrics say of a training that broke down, nothing of another."""
    return {"broke": learned.broke} if learned.broke else {}


class Judge:
    """How good a student is on data held out: accuracy with labels, else minus the mean KL
    divergence from the teacher, or where outputs are no logits minus the relative error.

    Labels that are no class of the teacher are refused (BadInput), those to learn from as well; an
    example without one, -100, counts for no accuracy. Accuracy is of the first output, the others
    the mean over all. Of equal accuracy, less KL divergence is better: it counts for less than half
    an example. logits: whether outputs with classes (second of 4 and 5 dimensions, else last) are
    logits of them.
    """

    def __init__(self, teacher: Network, data: TrainingData, logits: bool = True) -> None:
        self.data = data
        self.reference = all_outputs(teacher, data.held_out, BATCH)
        first = self.reference[0]
        self.measure, self.count = "relative_error", len(data.held_out)
        data.check_against(first)
        if data.labels is not None and first.ndim == 2 and first.shape[1] > 1:
            self.measure = "accuracy"
            self.count = int((data.labels != IGNORED).sum())
        elif logits and all(classes_last(x).shape[-1] > 1 for x in self.reference):
            self.measure = "mean_kld"

    def __call__(self, module: nn.Module) -> float:
        device = next(module.parameters()).device
        network = Network(module, (self.data.held_out[:1].to(device),))
        found = measure_network(
            network, self.data.held_out,
            self.data.labels if self.measure == "accuracy" else None,
            reference=self.reference, logits=self.measure != "relative_error", size=BATCH,
            resamples=1,
        ).as_dict()  # fmt: skip
        values: Any = found
        number = float(values[self.measure]["value"])
        if self.measure != "accuracy":
            return -number
        near = float(values["mean_kld" if "mean_kld" in values else "relative_error"]["value"])
        return number - 0.5 * near / (1 + near) / self.count

    def margin(self, value: float) -> float:
        """By how much chance alone may move a value: two standard errors of an accuracy, else 0."""
        return by_chance(value, self.count) if self.measure == "accuracy" else 0.0

    def shown(self, value: float) -> float:
        """What `measure` says of a value of this."""
        return round(value * self.count) / self.count if self.measure == "accuracy" else -value


def teaching(teacher: Network, lesson: Lesson, mirrored: bool = False) -> nn.Module:
    """What teaches: batch norms folded where only outputs are looked at; see lighten.mirrored.

    It shares nothing with the teacher, which may be asked elsewhere while this is on a device.
    """
    module = teacher.module
    if not lesson.needs & INSIDE:
        try:
            module = transforms["fold_batchnorm"](teacher).module
        except BadInput as error:
            note(f"the teacher runs as it is, its batch norms cannot be folded: {error.message}")
    module = own_copy(module)
    return Mirrored(module) if mirrored else module
