"""The integers of a network that lighten.quantize made learn from another: recover(quantized, ...).

Steps of weights and of the tensors between, and biases, learn; codes stay, so what is exported is
of the same form and size. It is what a run does after rounding (lighten.scales_stage).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lighten.errors import WrongUse
from lighten.learn_quantized import RATE, LearnedQuantized, learned_twin
from lighten.mirrored import mirrors
from lighten.network import Network
from lighten.quantized import Quantized
from lighten.scales_stage import HELD
from lighten.seen import INSIDE
from lighten.training_data import TrainingData
from lighten.usual_lesson import lesson_for

LENGTH = "100steps"
"""Of 8 examples each: more brings little, and integers are slow to simulate."""


def recover_integers(
    quantized: Quantized, teacher: Network, data: TrainingData, *, length: str = LENGTH,
    learn_from: str | None = None, rate: float = RATE, mirrored: bool | None = None,
    folder: Path | None = None, seed: int = 0,
) -> LearnedQuantized:  # fmt: skip
    """Let steps and biases learn; what comes back has no more KL divergence from the teacher on
    (at most 512) held-out examples than what was given, which is not changed; no more relative
    error, where outputs are numbers. learn_from: None: the usual lesson (lighten.usual_lesson).

    Raises WrongUse for a lesson that looks inside.
    """
    lesson = lesson_for(learn_from, teacher)
    if lesson.needs & INSIDE:
        raise WrongUse(
            f"integers cannot learn from `{lesson}`: their graph has no modules to look at",
            'a lesson on outputs or labels, such as "logits:1"',
        )
    data.course.check(lesson.needs)
    twice = mirrors(mirrored, teacher, lesson, data.course)
    judged = replace(data, held_out=data.held_out[:HELD], labels=None)
    twin, metrics = learned_twin(
        quantized, teacher, judged, length=length, codes=False, lesson=lesson, rate=rate,
        folder=folder, seed=seed, mirrored=twice,
    )  # fmt: skip
    return LearnedQuantized(twin.freeze(), (), metrics)
