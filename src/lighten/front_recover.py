"""The public verb for networks that lost something: recover(small, teacher, data=loader).

What lighten.quantize made learns too: its integers do (lighten.recover_integers).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lighten.errors import WrongUse
from lighten.front import loaded, opened
from lighten.learn_quantized import RATE, LearnedQuantized
from lighten.network import Network
from lighten.prune import Pruned
from lighten.quantized import Quantized
from lighten.recover import BATCH, Recovered
from lighten.recover import recover as recover_network
from lighten.recover_integers import LENGTH as INTEGERS
from lighten.recover_integers import recover_integers
from lighten.training_data import training_data

LENGTH, OPTIMIZER = "10epochs", "sgd"


def recover(
    model: Any,
    teacher: Any,
    example_inputs: Any = None,
    *,
    data: Any,
    held_out: Any = None,
    length: str | None = None,
    learn_from: str | None = None,
    rate: float | None = None,
    batch: int = BATCH,
    augment: str = "auto",
    optimizer: str = OPTIMIZER,
    masks: Mapping[str, Tensor] | None = None,
    patience: int | None = None,
    average: float | None = None,
    mirrored: bool | None = None,
    precision: str = "auto",
    accelerator: str = "auto",
    devices: int | str = 1,
    strategy: Any = "auto",
    folder: str | Path | None = None,
    seed: int = 0,
) -> Recovered | LearnedQuantized:
    """Let `model` learn to do what `teacher` does; never worse on held-out data than it was.

    model, teacher: modules with example_inputs, or what `lighten.prune` gave. data: as for
    lighten.compress. held_out: other data, by which the best state is chosen; without it, a tenth
    of `data` (at most 2048 examples), the others are learned from. length: None: "10epochs".
    folder: of checkpoints, from which the same call goes on, and logs. augment: "crop+flip",
    "crop+flip+cutmix", "crop+both", "crop+both+cutmix", "flip", "none" (lighten.course.ImageCourse)
    or "auto" (the first, of images). For all else see lighten.recover.recover. The model itself is
    not changed: the result has a `network`.

    model may also be what `lighten.quantize` gave: then the steps of its integers and its biases
    learn, 100 steps of 8 examples where `length` is None, by AdamW; rate None: 2e-4. The result has
    `quantized`, which is exported as what was given is. held_out should not have been calibrated
    on. Of all else folder, augment, mirrored and seed count, and the others are refused.

    Raises UserError.
    """
    if isinstance(model, Quantized):
        _only_of_floats({
            "batch": batch != BATCH, "optimizer": optimizer not in (OPTIMIZER, "adamw"),
            "masks": masks, "patience": patience is not None, "average": average is not None,
            "precision": precision not in ("auto", "32-true"), "accelerator": accelerator != "auto",
            "devices": devices != 1, "strategy": strategy != "auto",
        })  # fmt: skip
        example_inputs = model.network.inputs if example_inputs is None else example_inputs
    small = model if isinstance(model, Quantized) else _network(model, example_inputs)
    large = _network(teacher, example_inputs)
    found, others = (
        loaded(part, large, size=None, mean=None, std=None, crop=None) for part in (data, held_out)
    )
    lessons = training_data(found, tested=True, augment=augment, held_out=others, seed=seed)
    place = None if folder is None else Path(folder)
    if isinstance(small, Quantized):
        return recover_integers(
            small, large, lessons, length=length or INTEGERS, learn_from=learn_from,
            rate=RATE if rate is None else rate, mirrored=mirrored, folder=place, seed=seed,
        )  # fmt: skip
    return recover_network(
        small, large, lessons, length=length or LENGTH, learn_from=learn_from, rate=rate,
        batch=batch, optimizer=optimizer, masks=masks, patience=patience, average=average,
        mirrored=mirrored, precision=precision, accelerator=accelerator, devices=devices,
        strategy=strategy, folder=place, seed=seed,
    )  # fmt: skip


def _only_of_floats(given: Mapping[str, Any]) -> None:
    """Raises WrongUse where integers are given what only float weights know."""
    for name, value in given.items():
        if value:
            raise WrongUse(
                f"{name} is for weights that are float, and these are integers",
                "leave it out; or recover the float network before it is quantized",
            )


def _network(made: Any, example_inputs: Any) -> Network:
    return made.network if isinstance(made, Pruned) else opened(made, example_inputs)
