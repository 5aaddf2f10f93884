"""What a language model lost is learned back in the bytes that it has: scales, mins and norms.

Each block is moved towards what the original has behind it (lighten.language_blocks), then all of
them learn end to end from the model as it came, always rounded to what the file can store; codes
learn too, in the whole only those of models that are not large. The result is measured on windows
that were neither learned from nor stopped by, and is taken only where it lost less.
"""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lighten.data import Corpus, windows
from lighten.devices import best_precision, chosen, need_lightning
from lighten.errors import BadInput, WrongUse
from lighten.language_blocks import HEAD_WINDOWS, LEAST, Learning, learn_language_blocks
from lighten.language_job import HELD_OUT_WINDOWS
from lighten.language_student import LanguageModel, LanguageStudent
from lighten.learn import learn
from lighten.learn_state import remove_states
from lighten.learned_blocks import is_head
from lighten.learning_numbers import check_numbers
from lighten.length import Length
from lighten.lesson import Lesson
from lighten.measure import head_of
from lighten.model import Model
from lighten.progress import note
from lighten.run import Run
from lighten.sliced_lesson import SlicedLesson
from lighten.solve import Weights
from lighten.stored_teacher import answering
from lighten.text_course import TextCourse
from lighten.types import Compressed, Plan
from lighten.watched import Watched

WATCHED = 8
"""Windows that the best state is chosen by."""

TOKENS = 2048
"""In a step of all together: the gradient of one code needs much text."""

FOLDER, TAKEN = "recover", "recover/taken"
"""Where in the run what was learned is stored, and whether it was taken."""

BLOCK_STEPS, BLOCK_MODE = 160, "all"
"""Of each block before all learn together, and what learns there (see LearnedWeight)."""

RATE = 3e-4
"""Of norms and of what whole rows are multiplied by, in shares of their magnitude."""

FACTORS = {"row": 1.0, "vector": 1.0, "theta": 0.1, "offset": 6.6}
"""What a rate is multiplied by: rows, norms, the grid's entries, codes (in steps of the grid)."""

FEWEST = 2
"""Windows to learn from: one of them is watched."""

CODES = 250_000_000
"""Weights up to which codes learn in the whole as well: each of them takes 24 bytes more then."""


@dataclass(frozen=True)
class Made:
    """What is exported: the plan's weights, and the model that all else is taken from.

    learned: what was learned back, for metrics.json; None where nothing was asked to be.
    """

    plan: Plan
    weights: Weights
    model: Model
    learned: dict[str, Any] | None = None

    @property
    def given(self) -> dict[str, str]:
        """What an export depends on beyond the request."""
        learned = self.weights.folder.startswith(f"{FOLDER}/")
        return {**self.plan.specs, **({"weights": "learned"} if learned else {})}


def made(run: Run, model: Model, plan: Plan) -> Made:
    """What a run has made of its plan: as learned, where that was taken, else as solved."""
    taken = run.path(f"{TAKEN}.json")
    if run.whole(f"{TAKEN}.json") and json.loads(taken.read_text(encoding="utf-8"))["taken"]:
        return _stored(run, Weights(run, model, plan, FOLDER))
    return Made(plan, Weights(run, model, plan), model)


def wish(length: str | None, learn_from: str | None, patience: int | None = None) -> dict[str, Any]:
    """What a run's request says of learning; raises WrongUse, UnknownName, MissingPackage."""
    if length is None:
        for name, given in (("learn_from", learn_from), ("patience", patience)):
            if given is not None:
                raise WrongUse(f"{name} without recover", 'say how long too: --recover "500steps"')
        return {}
    check_numbers(patience=patience)
    need_lightning()
    lesson = Lesson.parse(learn_from or "logits:1")
    SlicedLesson.check(lesson)
    return {"recover": str(Length.parse(length)), "learn_from": str(lesson)} | (
        {} if patience is None else {"patience": patience}
    )


def recover(
    run: Run, before: Made, text: Callable[[], Tensor], *, length: str,
    learn_from: str = "logits:1", patience: int | None = None, mode: str | None = None,
    vectors: torch.dtype | None = None,
    seed: int = 0, rate: float = RATE, batch: int | None = None, folder: str = FOLDER,
    block_steps: int | None = None, block_mode: str = BLOCK_MODE,
) -> Made:  # fmt: skip
    """Learn the grids of the weights, and the norms. text: gives windows to learn from (`lessons`).

    block_steps: of each block alone, before (None: BLOCK_STEPS, 0: not at all). length: of all
    together, "500steps" or "1epochs". mode, block_mode: see LearnedWeight; mode None: "all" up to
    CODES weights, else "scales". vectors: the type that norms and biases are stored in, None: as
    they are now. folder: where in the run it is stored; the same call resumes. Raises WrongUse,
    BadOutput.
    """
    kept = Weights(run, before.model, before.plan, folder)
    if not (run.whole(f"{kept.folder}/facts.json") and all(kept.stored(name) for name in kept)):
        place = run.path(f"{folder}/learning")
        block_steps = BLOCK_STEPS if block_steps is None else block_steps
        mode = _mode(before) if mode is None else mode
        how = Learning(block_steps, block_mode, vectors is not None, seed)
        _learn(run, before, kept, text(), how, length, learn_from, patience, mode, vectors, seed,
               rate, batch, place, folder)  # fmt: skip
        remove_states(place)
    return _stored(run, kept)


def take(run: Run, old: Made, new: Made, before: Any, after: Any) -> Made:
    """`new` where it lost no more than `old`: Quality.as_dict() of both, on held-out windows."""
    was, now = before["mean_kld"]["value"], after["mean_kld"]["value"]
    if now > was:
        note(f"learning made it worse on held-out windows ({was:.4g} -> {now:.4g} nats): not taken")
    taken = bool(now <= was)
    run.json(TAKEN, lambda: {"taken": taken}, given=[was, now])
    facts = {"taken": "yes" if taken else "no", "mean_kld_before": was, "mean_kld_after": now}
    return replace(new if taken else old, learned=facts | (new.learned or {}))


def broken(learned: Mapping[str, Any]) -> list[str]:
    """The problem of a recovery that broke down, none of another. learned: a row of "recover"."""
    if "broke" not in learned:
        return []
    return [f"{learned['broke']}; the best state before, of step {learned['best_step']}, is kept"]


def check_text(corpus: Corpus, tokenizer: Any, size: int, first: int, seed: int) -> None:
    """Raises BadInput where nothing to learn from lies behind the `first` windows of a text."""
    found = len(windows(corpus, tokenizer, size, first + FEWEST, seed))
    if found < first + FEWEST:
        fits = found - FEWEST - HELD_OUT_WINDOWS
        raise BadInput(
            f"{corpus.source} gives {found} windows of {size} tokens, and {first} are calibrated"
            " and measured on: no text is left to learn from",
            "give more text"
            + (f", or --samples {fits}" if fits > 0 else ", or a smaller --length"),
        )


def lessons(
    corpus: Corpus, tokenizer: Any, size: int, first: int, length: str, seed: int = 0
) -> Tensor:
    """Windows (count, size) to learn from: behind the `first` that are calibrated and measured on,
    of documents in the same order (`seed`).

    Few steps together leave no less text to blocks, which learn before. Raises BadInput where the
    text ends before there are two.
    """
    asked = Length.parse(length)
    batch = max(1, TOKENS // size)
    wanted = max(int(asked.count) * batch, HEAD_WINDOWS)
    most = wanted if asked.unit == "steps" else 10**8 // size
    found = windows(corpus, tokenizer, size, first + WATCHED + most, seed)[first:]
    if len(found) < FEWEST:
        raise BadInput(
            f"{corpus.source} has no text left to learn from: {first} windows of {size} tokens are"
            " calibrated and measured on",
            "give more text, or smaller --samples",
        )
    return found


def _learn(
    run: Run, before: Made, kept: Weights, text: Tensor, how: Learning, length: str,
    learn_from: str, patience: int | None, mode: str, vectors: torch.dtype | None, seed: int,
    rate: float, batch: int | None, place: Path, folder: str,
) -> None:  # fmt: skip
    device = torch.device(chosen("auto"))
    few = min(WATCHED, max(1, len(text) // 4))
    watched, course = text[:few], TextCourse(text[few:])
    model, blocks = before.model, None
    weights: Mapping[str, Compressed] = before.weights
    teacher = LanguageModel(model, {}, device)
    head = head_of(model, *teacher.head())
    evaluate = Watched(teacher, watched, head)
    if how.steps and len(course.windows) < LEAST:
        note(f"{len(course.windows)} windows are too few for blocks to learn alone: left out")
    elif how.steps:
        (model, weights), blocks = _by_blocks(
            run, before, course.windows, how, evaluate, folder, device
        )
    student = LanguageStudent(model, weights, mode=mode, vectors=vectors is not None, device=device)
    precision = best_precision("auto", device.type)
    lesson = SlicedLesson(Lesson.parse(learn_from), student.head, head, precision)
    batch = min(course.count, max(1, TOKENS // text.shape[1]) if batch is None else batch)
    steps = Length.parse(length).steps(course.count // batch)
    learned = learn(
        student, answering(run, lesson.terms, teacher, head, course.windows, steps * batch),
        lesson, course,  # type: ignore[arg-type]
        length=f"{steps}steps", rate=rate, batch=batch,
        evaluate=evaluate, optimizer="adamw", weight_decay=0.0,
        group=_group, precision=precision, folder=place, seed=seed,
        every=max(1, steps // 5), patience=patience, accept_broken=True, name="learn scales",
    )  # fmt: skip
    frozen, values = student.freeze()
    for name in kept:
        parts = (frozen[name] if name in frozen else weights[name]).parts
        kept.once(name, lambda parts=parts: parts)  # type: ignore[misc]
    run.tensors(f"{kept.folder}/vectors", lambda: {k: v.to(vectors) for k, v in values.items()})
    facts = {
        "steps": learned.steps, "tokens": learned.steps * batch * text.shape[1],
        "best_step": learned.best_step, "seconds": learned.seconds, "mode": mode,
        "learn_from": str(lesson), "trained": sum(p.numel() for p in student.parameters()),
        "watched_kld_before": -learned.first, "watched_kld_after": -learned.best,
    }  # fmt: skip
    if learned.broke:
        facts["broke"] = learned.broke
    if blocks is not None:
        facts |= {"watched_kld_before": blocks["watched_kld_before"], "blocks": blocks}
    run.json(f"{kept.folder}/facts", lambda: facts)


def _by_blocks(
    run: Run, before: Made, text: Tensor, how: Learning, evaluate: Watched, folder: str,
    device: torch.device,
) -> tuple[tuple[Model, Mapping[str, Compressed]], dict[str, Any]]:  # fmt: skip
    """The model and weights after each block has learned, with the head as it learned or as it was,
    whichever is nearest to the original on the watched windows; as they were, where that is nearer;
    and what metrics.json says of it."""
    old: Mapping[str, Compressed] = before.weights
    found = learn_language_blocks(run, before.model, old, text, how, f"{folder}/blocks", device)
    model = before.model.with_vectors(found.vectors)

    def kld(model: Model, weights: Mapping[str, Compressed]) -> float:
        return -evaluate(LanguageModel(model, weights, device))

    heads = {la.name for la in model.layers if is_head(la)} & {row["block"] for row in found.errors}
    weights = found.weights
    was, now = kld(before.model, old), kld(model, weights)
    if heads:
        plain = ChainMap({name: old[name] for name in heads}, weights)  # type: ignore[arg-type]
        without = kld(model, plain)
        if without < now:
            note(f"the head that learned makes it worse ({without:.4g} -> {now:.4g}): not taken")
            weights, now = plain, without
    if now > was:
        note(f"blocks that learned alone are worse together ({was:.4g} -> {now:.4g}): not taken")
    facts = {
        "taken": "yes" if now <= was else "no",
        "head": "yes" if heads and weights is found.weights and now <= was else "no",
        "steps": how.steps, "mode": how.mode,
        "watched_kld_before": was, "watched_kld_after": now,
        "seconds": sum(row["seconds"] for row in found.errors), "errors": found.errors,
    }  # fmt: skip
    return (model, weights) if now <= was else (before.model, old), facts


def _mode(before: Made) -> str:
    compressed = [layer for layer in before.model.layers if layer.name in before.weights]
    return "all" if sum(prod(layer.shape) for layer in compressed) <= CODES else "scales"


def _stored(run: Run, kept: Weights) -> Made:
    vectors = run.tensors(f"{kept.folder}/vectors", dict)
    facts = run.json(f"{kept.folder}/facts", dict)
    return Made(kept.plan, kept, kept.model.with_vectors(vectors), facts)


def _group(name: str, parameter: nn.Parameter) -> tuple[float, float]:
    kind = name.removeprefix("student.").replace(".", "/").split("/")[0].split("@")[0]
    return FACTORS.get(kind, 1.0), 0.0
