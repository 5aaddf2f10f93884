"""A quantized network learns to do what the float network does: steps alone, or codes too.

First, where asked, each block against the float network's; then the whole by a lesson, as a rule
the KL divergence from the float network's outputs. The best state on held-out images is kept. They
must not have been calibrated on: a quantized network is fitted so closely to its calibration images
that those say little of others (measured: docs/concepts/learning-integers.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lighten.blockwise import Block, held_quarter, learn_blocks
from lighten.course import ImageCourse
from lighten.errors import BadInput
from lighten.learn import learn
from lighten.length import Length
from lighten.lesson import Lesson
from lighten.network import Network
from lighten.progress import note
from lighten.quantized import Quantized
from lighten.recover import Judge, broken, teaching
from lighten.registry import transforms
from lighten.samples import digest
from lighten.trainable import Trainable, trainable
from lighten.training_data import TrainingData
from lighten.usual_lesson import lesson_for

RATE = 2e-4
"""Of AdamW. With 3e-3 EfficientNet-Lite0 got worse on held-out images from the first steps on."""

BATCH = 8
FEWEST = 8


@dataclass(frozen=True, eq=False)
class LearnedQuantized:
    """quantized: as it was best on held-out images, maybe as it was given. blocks: what block-wise
    learning did. metrics: {"length", "learn_from", "codes", "mirrored", "rate", "steps",
    "best_step", "images", "held_out", "measure", "before", "after", "minutes"}."""

    quantized: Quantized
    blocks: tuple[Block, ...]
    metrics: dict[str, Any]


def quantize_and_learn(
    network: Network, data: Tensor, make: Callable[[Tensor], Quantized], *,
    length: str = "100steps", codes: bool = False, learn_from: str | None = None,
    block_steps: int = 0, rate: float = RATE, augment: str = "auto", folder: Path | None = None,
    seed: int = 0,
) -> LearnedQuantized:  # fmt: skip
    """Quantize on three quarters of the data, and learn on them, the last quarter held out.

    make: calibration data -> the quantized network. augment: "flip" (each image is calibrated on
    and learned from mirrored as well), "crop+flip", "none"; "auto" is "flip" for images.
    For all else see learn_quantized. Raises UserError.
    """
    _enough(data)
    seen = data[~held_quarter(len(data))]
    augment = _augmentation(data, augment)
    made = make(seen if augment == "none" else torch.cat([seen, seen.flip(-1)]))
    return learn_quantized(
        made, network, data, length=length, codes=codes, learn_from=learn_from,
        block_steps=block_steps, rate=rate, augment=augment, folder=folder, seed=seed,
    )  # fmt: skip


def learn_quantized(
    quantized: Quantized, teacher: Network, data: Tensor, *, length: str = "100steps",
    codes: bool = False, learn_from: str | None = None, block_steps: int = 0, rate: float = RATE,
    augment: str = "auto", folder: Path | None = None, seed: int = 0,
) -> LearnedQuantized:  # fmt: skip
    """Let steps and biases learn, with `codes` the codes too (quantization-aware training).

    teacher: the float network. learn_from: the lesson; None: "logits:1", or "outputs:1" where
    outputs are no logits. data: (count, ...); every fourth example is held out and should not
    have been calibrated on. block_steps: steps for each block before; its batch norms are folded
    then as quantize does it. folder: of checkpoints. `quantized` is not changed; what comes back is
    never worse on held-out data. Raises UserError.
    """
    _enough(data)
    lesson = lesson_for(learn_from, teacher)
    at = held_quarter(len(data))
    held, blocks = data[at], list[Block]()
    judged = TrainingData(
        ImageCourse(data[~at], augment=_augmentation(data, augment)), held, None, "", digest(data)
    )
    judge, made = Judge(teacher, judged, logits=not lesson.numbers), quantized
    start = judge(trainable(quantized, _mode(codes)))
    if block_steps > 0:
        dense = transforms["fold_batchnorm"](teacher, data)
        made, blocks = learn_blocks(
            quantized, dense, data, steps=block_steps, rate=rate, mode=_mode(codes), seed=seed
        )
        if judge(trainable(made, _mode(codes))) < start:  # better blocks, not a better whole
            note("blocks that were learned are no better together: they stay as they were")
            made = quantized
    twin, metrics = learned_twin(
        made, teacher, judged, length=length, codes=codes, lesson=lesson, rate=rate, folder=folder,
        seed=seed, judge=judge,
    )  # fmt: skip
    metrics["before"] = judge.shown(start)
    return LearnedQuantized(twin.freeze(), tuple(blocks), metrics)


def learned_twin(
    made: Quantized, teacher: Network, data: TrainingData, *, length: str | Length, codes: bool,
    lesson: Lesson, rate: float = RATE, folder: Path | None = None, seed: int = 0,
    judge: Judge | None = None, keep_given: bool = True, mirrored: bool = False,
    accept_broken: bool = False, name: str = "learn integers",
) -> tuple[Trainable, dict[str, Any]]:  # fmt: skip
    """The trainable twin of `made` as it was best on what `data` holds out, and its metrics.

    keep_given: maybe as it was given; False: the best trained state, for a caller that compares
    both on other data. judge: of `data`, where there is one already. mirrored: the teacher looks
    twice (lighten.mirrored). accept_broken: see lighten.learn.learn.
    """
    judge = judge or Judge(teacher, data, logits=not lesson.numbers)
    twin = trainable(made, _mode(codes))
    learned = learn(
        twin, teaching(teacher, lesson, mirrored), lesson, data.course, length=length, rate=rate,
        batch=min(BATCH, data.course.count), evaluate=judge, folder=folder, seed=seed,
        optimizer="adamw", weight_decay=0.0, precision="32-true", keep_given=keep_given,
        accept_broken=accept_broken, name=name,
        given={"mirrored": mirrored, "teacher": teacher.digest, "data": data.digest},
    )  # fmt: skip
    return twin, {
        "length": str(Length.parse(length)), "learn_from": str(lesson), "codes": codes,
        "mirrored": mirrored, "rate": rate, "steps": learned.steps, "best_step": learned.best_step,
        "images": data.course.count, "held_out": len(data.held_out), "measure": judge.measure,
        "before": judge.shown(learned.first), "after": judge.shown(learned.best),
        "minutes": round(learned.seconds / 60, 2), **broken(learned),
    }  # fmt: skip


def _mode(codes: bool) -> str:
    return "all" if codes else "scales"


def _enough(data: Tensor) -> None:
    if len(data) < FEWEST:
        raise BadInput(
            f"{len(data)} examples to learn from", f"at least {FEWEST}: a quarter is held out"
        )


def _augmentation(data: Tensor, augment: str) -> str:
    if augment != "auto":
        return augment
    return "flip" if data.ndim == 4 and data.shape[1] in (1, 3) else "none"
