"""What is learned from without a word, and whether a lesson goes with what a network returns."""

from __future__ import annotations

import torch
from torch import Tensor

from lighten.errors import WrongUse
from lighten.heads import classes_last
from lighten.lesson import PROBABILITIES, Lesson
from lighten.network import Network
from lighten.progress import note
from lighten.seen import no_classes
from lighten.watch import every_output

LOGITS, NUMBERS = "logits:1", "outputs:1"


def lesson_for(
    learn_from: str | Lesson | None, teacher: Network, temperature: float | None = None
) -> Lesson:
    """A lesson as it was written; where none was, the usual one. Raises UserError where it does not
    go with what the teacher returns."""
    text = usual_lesson(teacher) if learn_from is None else learn_from
    lesson = Lesson.parse(text, temperature) if isinstance(text, str) else text
    check_outputs(lesson, teacher)
    return lesson


def usual_lesson(teacher: Network) -> str:
    """LOGITS, or NUMBERS where an output of the teacher is no logits.

    That is one number where classes would be, and what has the form of the input: as many channels
    as the image that goes in, as many features as the sequence, as denoisers and autoencoders have.
    The form is a guess, which is told: three classes of every pixel of an RGB image look the same.
    Raises BadInput where it returns nothing to learn from.
    """
    x = teacher.inputs[0]
    like = classes_last(x).shape[-1] if x.is_floating_point() and x.dim() > 2 else 0
    found = returned(teacher)
    if any(y.shape[-1] < 2 for y in found):
        return NUMBERS
    if any(y.dim() > 2 and y.shape[-1] == like for y in found):
        note(
            f"outputs have {like} channels, as the inputs have: taken for numbers, as of a denoiser"
            f' ("{NUMBERS}"); if they are logits of {like} classes, learn from "{LOGITS}"'
        )
        return NUMBERS
    return LOGITS


def check_outputs(lesson: Lesson, network: Network) -> None:
    """Raises WrongUse where a lesson looks for classes and finds a number, or would leave the
    outputs beside the first to chance."""
    found = returned(network)
    for term in lesson.terms:
        if term.weight and term.name in PROBABILITIES:
            seen = found if term.loss.taught else found[:1]
            if any(x.shape[-1] < 2 for x in seen):
                raise WrongUse(*no_classes(term.name))
    if len(found) > 1 and "labels" in lesson.needs and not lesson.compares:
        raise WrongUse(
            f"the network gives {len(found)} outputs, and `{lesson}` teaches the first alone",
            f'labels are of the first; "{lesson},outputs:1" holds the others to the teacher',
        )


def check_student(student: Network, teacher: Network) -> None:
    """Raises WrongUse where a student has outputs that its teacher has none for."""
    ours, theirs = len(returned(student)), len(returned(teacher))
    if ours > theirs:
        raise WrongUse(
            f"the student gives {ours} outputs, its teacher {theirs}: nothing teaches the others",
            "wrap the student in a module that returns what is to be learned",
        )


@torch.no_grad()
def returned(network: Network) -> tuple[Tensor, ...]:
    """The outputs for the example inputs, (batch, ..., classes) each."""
    return every_output(network(*network.inputs))
