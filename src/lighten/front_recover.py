"""The public verb for networks that lost something: recover(small, teacher, data=loader)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lighten.front import loaded, opened
from lighten.network import Network
from lighten.prune import Pruned
from lighten.recover import BATCH, Recovered
from lighten.recover import recover as recover_network
from lighten.training_data import training_data


def recover(
    model: Any,
    teacher: Any,
    example_inputs: Any = None,
    *,
    data: Any,
    held_out: Any = None,
    length: str = "10epochs",
    learn_from: str | None = None,
    rate: float | None = None,
    batch: int = BATCH,
    augment: str = "auto",
    optimizer: str = "sgd",
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
) -> Recovered:
    """Let `model` learn to do what `teacher` does; never worse on held-out data than it was.

    model, teacher: modules with example_inputs, or what `lighten.prune` gave. data: as for
    lighten.compress. held_out: other data, by which the best state is chosen; without it, a tenth
    of `data` (at most 2048 examples), the others are learned from. folder: of checkpoints, from
    which the same call goes on, and logs. augment: "crop+flip", "crop+flip+cutmix", "flip",
    "none" or "auto" (the first, of images). For all else see lighten.recover.recover. The model
    itself is not changed: the result has a `network`. Raises UserError.
    """
    small, large = _network(model, example_inputs), _network(teacher, example_inputs)
    found, others = (
        loaded(part, large, size=None, mean=None, std=None, crop=None) for part in (data, held_out)
    )
    lessons = training_data(found, tested=True, augment=augment, held_out=others, seed=seed)
    return recover_network(
        small, large, lessons, length=length, learn_from=learn_from, rate=rate, batch=batch,
        optimizer=optimizer, masks=masks,
        patience=patience, average=average, mirrored=mirrored, precision=precision,
        accelerator=accelerator, devices=devices, strategy=strategy,
        folder=None if folder is None else Path(folder), seed=seed,
    )  # fmt: skip


def _network(made: Any, example_inputs: Any) -> Network:
    return made.network if isinstance(made, Pruned) else opened(made, example_inputs)
