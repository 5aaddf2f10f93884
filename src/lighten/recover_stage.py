"""Recovery as a stage of a run: prune -> recover -> quantize, with numbers for each step.

run/recover/network-<digest>.safetensors     the recovered state
run/recover/network-<digest>.json            what was learned, and how long it took
run/recover/learning-<digest>/               history.jsonl, TensorBoard, and while it lasts
                                             checkpoints (lighten.learn_state)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lighten import network_results
from lighten.atomic import sha256
from lighten.devices import need_lightning
from lighten.job import Job, quality
from lighten.learn_state import remove_states
from lighten.learning_numbers import check_numbers
from lighten.length import Length
from lighten.lesson import Lesson
from lighten.mirrored import mirrors
from lighten.network import Network
from lighten.optimizers import usual_rate
from lighten.progress import note, stage
from lighten.quantized import Quantized
from lighten.recover import recover
from lighten.sparse import nearest
from lighten.sparsify import mask_of
from lighten.training_data import TrainingData, training_data
from lighten.types import Compressed
from lighten.usual_lesson import check_outputs, returned

OPTIMIZER = "sgd"

_SHOWN = ("accuracy", "evaluate", "top1_agreement", "mean_kld", "relative_error")


@dataclass(frozen=True, eq=False)
class Recovery:
    """What is learned back, how long and from what. rate None: lighten.recover's own."""

    length: Length
    lesson: Lesson
    rate: float | None
    augment: str
    data: TrainingData
    seed: int = 0
    mirrored: bool | None = None
    optimizer: str = OPTIMIZER
    patience: int | None = None

    @classmethod
    def of(
        cls, data: Any, length: str, learn_from: str, rate: float | None,
        augment: str | None, *, calibration: int, tested: bool, seed: int = 0, source: str = "",
        mirrored: bool | None = None, optimizer: str | None = None,
        patience: int | None = None,
    ) -> Recovery:  # fmt: skip
        """Read what a user wrote, before anything is computed; raises WrongUse, MissingPackage.

        data, calibration, tested, seed: see lighten.training_data. augment: without a word,
        "crop+flip" for images and "none" for all else. mirrored, optimizer: see
        lighten.recover.recover.
        """
        need_lightning()
        span, lesson = Length.parse(length), Lesson.parse(learn_from)
        _ = usual_rate(optimizer or OPTIMIZER)  # is there such a one?
        check_numbers(rate=rate, patience=patience)
        found = training_data(
            data, calibration=calibration, tested=tested, seed=seed, augment=augment or "auto",
            source=source,
        )  # fmt: skip
        found.course.check(lesson.needs)
        return cls(span, lesson, rate, found.course.augment, found, seed, mirrored,
                   optimizer or OPTIMIZER, patience)  # fmt: skip

    def check(self, network: Network) -> None:
        """Raises WrongUse where this network cannot teach as it is asked to, BadInput for labels
        that are no class of it."""
        check_outputs(self.lesson, network)
        self.looks_twice(network)
        self.data.check_against(returned(network)[0])

    def looks_twice(self, network: Network) -> bool:
        """Whether this network teaches as lighten.mirrored says; raises WrongUse."""
        return mirrors(self.mirrored, network, self.lesson, self.data.course)

    def request(self) -> dict[str, Any]:
        """What another request differs in."""
        return {
            "length": str(self.length), "learn_from": str(self.lesson), "rate": self.rate,
            "augment": self.augment, "data": self.data.digest, "seed": self.seed,
            "mirrored": self.mirrored, "optimizer": self.optimizer,
            "patience": self.patience,
        }  # fmt: skip


def recovered(
    job: Job,
    network: Network,
    sparse: Quantized | None,
    recovery: Recovery,
    before: Mapping[str, Any],
    given: str,
) -> tuple[Network, Quantized | None, dict[str, Any]]:
    """The network after it has learned from the original, its sparse weights too, and what
    metrics.json says: {"recover": [what was learned], "steps": [quality after each step]}.

    The best trained state is measured as the run's result is, and is taken only where it is better
    there than what was given. A recovery that breaks down ends there, which metrics.json says as
    `broke`: the rest of the run is not lost. before: quality of the original. given: what `network`
    was made by.
    """
    key = sha256(given.encode())[:12]
    name, folder = f"recover/network-{key}", job.run.folder / "recover" / f"learning-{key}"
    kept = {} if sparse is None else {n: mask_of(w) for n, w in sparse.weights.items()}
    state = network.module.state_dict()

    def learn() -> Mapping[str, Tensor]:
        masks = {n: mask.reshape(state[n].shape) for n, mask in kept.items()}
        found = recover(
            network, job.network, recovery.data, length=recovery.length, learn_from=recovery.lesson,
            rate=recovery.rate, masks=masks, folder=folder, seed=recovery.seed, keep_given=False,
            mirrored=recovery.mirrored, optimizer=recovery.optimizer, patience=recovery.patience,
            accept_broken=True,
        )  # fmt: skip
        job.run.json(name, lambda: found.metrics, given=given)
        return found.network.module.state_dict()

    pruned = job.run.json(
        "measured/before_recovery", lambda: _measured(job, network, "before recovery"), given=given
    )
    better = network.with_module(copy.deepcopy(network.module))
    better.module.load_state_dict(job.run.tensors(name, learn, given=given))
    remove_states(folder)  # what they led to is stored
    after = job.run.json(
        "measured/recovered", lambda: _measured(job, better, "after recovery"), given=given
    )
    taken = score(after) > score(pruned)
    if not taken:
        note("recovery measured no better than what it was given, which is kept")
    elif sparse is not None:
        values = better.module.state_dict()
        again = {
            n: _repacked(w, values[n].reshape(w.shape), kept[n]) for n, w in sparse.weights.items()
        }
        sparse = Quantized(better, again, {})
    steps = {"original": before, "pruned": pruned, "recovered": after}
    told = job.run.json(name, dict, given=given)
    learned = {"what": "weights", **told, "taken": "yes" if taken else "no"}
    return better if taken else network, sparse, {
        "recover": [learned], "steps": [row(step, found) for step, found in steps.items()],
    }  # fmt: skip


def row(step: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What a table of steps shows of a quality."""
    return {"step": step, **{k: found[k] for k in _SHOWN if k in found}}


def score(quality: Mapping[str, Any]) -> float:
    """The user's own measure, accuracy where there are labels, else closeness to the original."""
    if "evaluate" not in quality and "accuracy" in quality:
        return float(quality["accuracy"]["value"])
    return network_results.score(quality)


def _measured(job: Job, network: Network, what: str) -> dict[str, Any]:
    with stage(f"measure {what}"):
        return quality(job, network)


def _repacked(weight: Compressed, values: Tensor, kept: Tensor) -> Compressed:
    format: Any = weight.format
    return nearest(values.float(), kept, format, None, weight.spec)
