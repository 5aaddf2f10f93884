"""Integers that learn, as a stage of a run: quantize -> recover scales, with numbers for each.

run/recover/scales-<digest>.safetensors      the state of lighten.trainable's twin, as it was best
run/recover/scales-<digest>.json             what was learned, and how long it took
run/recover/learning-scales-<digest>/        history.jsonl, TensorBoard, and while it lasts
                                             checkpoints (lighten.learn_state)

Formats, names and shapes stay: the file has the form that quantization alone gives it. Rounding is
not stored but done again, and what was learned is put on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lighten import network_results
from lighten.atomic import sha256
from lighten.devices import need_lightning
from lighten.job import Job, quality, runner
from lighten.learn_quantized import learned_twin
from lighten.learn_state import remove_states
from lighten.length import Length
from lighten.lesson import Lesson
from lighten.network import Network
from lighten.progress import note, stage
from lighten.quantized import Quantized
from lighten.recover_stage import Recovery, row, score
from lighten.seen import INSIDE
from lighten.trainable import trainable
from lighten.training_data import TrainingData, training_data
from lighten.usual_lesson import lesson_for, returned

STEPS = 100
"""Of a recovery that says nothing of scales: as many as it has itself, but no more than these."""

HELD = 512
"""Examples that the best state is chosen by at most: a network of integers is slow to simulate."""

NONE = "none"


@dataclass(frozen=True, eq=False)
class Scales:
    """How steps, biases and, with `codes`, codes learn. asked: by name, not with a recovery.
    mirrored: the original looks twice, as it did in the recovery before."""

    length: Length
    codes: bool
    lesson: Lesson
    data: TrainingData
    seed: int
    asked: bool
    mirrored: bool = False

    @classmethod
    def of(
        cls, network: Network, data: Any, learn: str | None, codes: bool, recovery: Recovery | None,
        learn_from: str | None, augment: str | None, *, calibration: int, tested: bool,
        seed: int = 0, source: str = "",
    ) -> Scales | None:  # fmt: skip
        """Read what a user wrote, before anything is computed; None where nothing is to be learned.

        learn: "100steps", "none", or None: as `recovery` suggests. Raises WrongUse, MissingPackage.
        """
        if learn == NONE or (learn is None and recovery is None):
            return None
        need_lightning()
        lesson = lesson_for(learn_from, network)
        if lesson.needs & INSIDE:
            lesson = lesson_for(None, network)  # a graph of integers has no modules to look at
        if recovery is not None:
            data = recovery.data
        else:
            data = training_data(
                data, calibration=calibration, tested=tested, seed=seed, augment=augment or "auto",
                source=source,
            )  # fmt: skip
        data.course.check(lesson.needs)
        data.check_against(returned(network)[0])
        length = Length.parse(learn) if learn is not None else _suggested(recovery, data)
        held = data.held_out[:HELD]
        return cls(
            length, codes, lesson, replace(data, held_out=held, labels=None), seed,
            learn is not None, recovery is not None and recovery.looks_twice(network),
        )  # fmt: skip

    def request(self) -> dict[str, Any]:
        """What another request differs in."""
        return {
            "length": str(self.length), "codes": self.codes, "learn_from": str(self.lesson),
            "data": self.data.digest, "augment": self.data.course.augment, "seed": self.seed,
            "mirrored": self.mirrored,
        }  # fmt: skip


def rescaled(
    job: Job, made: Quantized, scales: Scales, given: str
) -> tuple[Quantized, dict[str, Any]]:
    """The quantized network after it has learned from the original, and what metrics.json says:
    {"recover": [what was learned], "steps": [quality before and after it]}.

    The best trained state is measured as the run's result is, and is taken only where it is better
    there. given: what `made` was made by.
    """
    key = sha256(given.encode())[:12]
    name, folder = f"recover/scales-{key}", job.run.folder / "recover" / f"learning-scales-{key}"

    def learn() -> Mapping[str, Tensor]:
        twin, metrics = learned_twin(
            made, job.network, scales.data, length=scales.length, codes=scales.codes,
            lesson=scales.lesson, folder=folder, seed=scales.seed, keep_given=False,
            mirrored=scales.mirrored, accept_broken=True, name="recover scales",
        )  # fmt: skip
        job.run.json(name, lambda: _told(metrics), given=given)
        return twin.state_dict()

    before = job.run.json(
        "measured/quantized", lambda: _measured(job, made, "before it"), given=given
    )
    twin = trainable(made, "all" if scales.codes else "scales")
    twin.load_state_dict(job.run.tensors(name, learn, given=given))
    remove_states(folder)  # what they led to is stored
    better = twin.freeze()
    after = job.run.json(
        "measured/rescaled", lambda: _measured(job, better, "after it"), given=given
    )
    taken = _rank(after) > _rank(before)
    if not taken:
        note("scales that were learned measured no better than those that were given: these stay")
    learned = {**job.run.json(name, dict, given=given), "taken": "yes" if taken else "no"}
    steps = {"quantized": before, "scales recovered": after}
    return better if taken else made, {
        "recover": [learned], "steps": [row(step, found) for step, found in steps.items()],
    }  # fmt: skip


def joined(
    first: Mapping[str, Any], second: Mapping[str, Any], original: Mapping[str, Any]
) -> dict[str, Any]:
    """What two stages learned one after the other; the first may have learned nothing."""
    begun = first or {"recover": [], "steps": [row("original", original)]}
    return {key: [*begun[key], *second[key]] for key in ("recover", "steps")}


def _suggested(recovery: Recovery | None, data: TrainingData) -> Length:
    """Of a recovery of fewer steps, as many."""
    if recovery is None:
        return Length(STEPS, "steps")
    from lighten.recover import BATCH

    batch = min(BATCH, data.course.count)
    return Length(min(STEPS, recovery.length.steps(-(-data.course.count // batch))), "steps")


def _rank(quality: Mapping[str, Any]) -> tuple[float, float]:
    """What counts; of equals, the nearer to the original."""
    return score(quality), network_results.score(quality)


def _told(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A row for `recover`, its keys as those of a recovery of weights."""
    names = {"images": "examples"}
    found = {names.get(k, k): v for k, v in metrics.items() if k != "codes"}
    return {"what": "scales and codes" if metrics["codes"] else "scales", **found}


def _measured(job: Job, made: Quantized, when: str) -> dict[str, Any]:
    with stage(f"recover scales: measure {when}"):
        return quality(job, runner(made))
