"""Temperature and weights of a lesson chosen by what a student is worth on held-out data.

Short trainings are tried by Optuna, kept in an SQLite file, and stopped early where they are worse
than half of those before at the same place. What is drawn for a trial depends on the seed and the
trials before it alone, so a study that was killed goes on as if it had not been.

*Source:* Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization" (TPE); Golovin et al.
2017, "Google Vizier", section 3.2.2 (median stopping).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lighten.errors import BadOutput, MissingPackage, WrongUse
from lighten.lesson import Lesson, Term
from lighten.progress import note, stage
from lighten.seeds import seed_of

SHARE = 0.2
"""Of the length, that each trial has."""

COLDEST, HOTTEST = 1.0, 16.0
WIDER = 30.0
"""A weight is looked for between its value over this and its value times this."""

FIRST = 3
"""Trials before any is stopped early."""

Report = Callable[[float], None]
"""Called with each value on held-out data; leaves the training where the trial is not worth it."""


@dataclass(frozen=True)
class Tuned:
    """lesson: the best. rows: {trial, lesson, value, state, seconds, chosen}, one a trial."""

    lesson: Lesson
    rows: list[dict[str, Any]]


def tune(
    lesson: Lesson,
    trials: int,
    learn: Callable[[Lesson, Report], float],
    folder: Path,
    seed: int = 0,
) -> Tuned:
    """The best of `trials` lessons, `lesson` as it is the first of them.

    learn: teaches a fresh student and returns its best value on held-out data, higher is better.
    The weight of the first loss stays, what is varied are the others and all temperatures. folder:
    of study.db, which goes on where it stopped. Raises WrongUse, MissingPackage, BadOutput where no
    trial ended.
    """
    optuna = _optuna()
    check_tunable(lesson, trials)
    folder.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.RDBStorage(f"sqlite:///{(folder / 'study.db').resolve()}")
    try:
        study = optuna.create_study(
            storage=storage, study_name="lesson", direction="maximize", load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=FIRST, n_warmup_steps=1),
        )  # fmt: skip
        _settle(optuna, study)
        with stage("tune", trials, "trials") as tick:
            tick(len(_ended(study)))
            while (number := len(_ended(study))) < trials:
                study.sampler = optuna.samplers.TPESampler(
                    seed=seed_of(seed, "trial", number) >> 32
                )
                _try(optuna, study, lesson, number, learn)
                tick()
        ended = _ended(study)
        good = [t for t in ended if t.state == optuna.trial.TrialState.COMPLETE]
        if not good:
            raise BadOutput(
                f"none of {trials} trials ended: {ended[0].user_attrs.get('why', '')}",
                "a lower rate, or clip the gradient",
            )
        best = max(good, key=lambda t: t.value)
        return Tuned(
            Lesson.parse(best.user_attrs["lesson"]), [_row(i, t, best) for i, t in enumerate(ended)]
        )
    finally:
        storage.remove_session()
        storage.engine.dispose()


def check_tunable(lesson: Lesson, trials: int) -> None:
    """Raises WrongUse where a lesson has nothing to choose, MissingPackage without Optuna."""
    _optuna()
    if trials < 1:
        raise WrongUse(f"{trials} trials", "at least 1, and 20 or more to find something")
    if len(lesson.terms) < 2 and not any(_has_temperature(term) for term in lesson.terms):
        raise WrongUse(
            f"there is nothing to tune in the lesson `{lesson}`",
            'temperature and the weights of losses are chosen: "logits:1,labels:0.5"',
        )


def drawn(lesson: Lesson, suggest: Callable[[str, float, float], float]) -> Lesson:
    """The lesson with other numbers. suggest: name, lowest, highest -> a number, log-uniform."""
    terms = []
    for i, term in enumerate(lesson.terms):
        if i and term.weight:
            weight = suggest(f"{term.name} weight", term.weight / WIDER, term.weight * WIDER)
            term = replace(term, weight=float(f"{weight:.3g}"))
        if _has_temperature(term):
            loss: Any = term.loss
            low, high = min(COLDEST, loss.temperature), max(HOTTEST, loss.temperature)
            value = float(f"{suggest(f'{term.name} temperature', low, high):.3g}")
            term = replace(term, loss=dataclasses.replace(loss, temperature=value))
        terms.append(term)
    return Lesson(tuple(terms))


def _try(
    optuna: Any, study: Any, lesson: Lesson, number: int, learn: Callable[[Lesson, Report], float]
) -> None:
    states = optuna.trial.TrialState
    if not number and not study.get_trials(states=(states.WAITING,)):
        study.enqueue_trial(_numbers(lesson))
    trial = study.ask()
    other = drawn(lesson, lambda *range_: trial.suggest_float(*range_, log=True))
    own = other if number else lesson  # what was asked for, to the last digit
    trial.set_user_attr("lesson", str(own))
    began, seen = time.monotonic(), 0

    def report(value: float) -> None:
        nonlocal seen
        if seen:  # the first is of the student as it begins, the same in all
            trial.report(value, seen)
            if trial.should_prune():
                raise optuna.TrialPruned
        seen += 1

    try:
        value, state = learn(own, report), states.COMPLETE
    except optuna.TrialPruned:
        value, state = None, states.PRUNED
    except BadOutput as error:
        value, state = None, states.FAIL
        note(f"trial {number}: {error.message}")
        trial.set_user_attr("why", error.message)
    trial.set_user_attr("seconds", round(time.monotonic() - began, 1))
    # what `tell` would lose in a kill
    trial.set_user_attr("outcome", {"value": value, "state": state.name})
    study.tell(trial, value, state=state)


def _ended(study: Any) -> list[Any]:
    """Trials that came to an end, in order; not those that a kill left."""
    return [t for t in study.get_trials() if t.state.is_finished() and "outcome" in t.user_attrs]


def _settle(optuna: Any, study: Any) -> None:
    """What a kill left running: told to the study where it had come to an end, else forgotten."""
    states = optuna.trial.TrialState
    for trial in study.get_trials(states=(states.RUNNING,)):
        outcome = trial.user_attrs.get("outcome", {"value": None, "state": "FAIL"})
        study.tell(trial.number, outcome["value"], state=states[outcome["state"]])


def _numbers(lesson: Lesson) -> dict[str, float]:
    """What `drawn` would have to be given for the lesson as it is."""
    found = {f"{term.name} weight": term.weight for term in lesson.terms[1:] if term.weight}
    losses: dict[str, Any] = {
        term.name: term.loss for term in lesson.terms if _has_temperature(term)
    }
    return found | {f"{name} temperature": loss.temperature for name, loss in losses.items()}


def _row(number: int, trial: Any, best: Any) -> dict[str, Any]:
    seen = trial.intermediate_values
    value = trial.value if trial.value is not None else (max(seen.values()) if seen else None)
    return {
        "trial": number, "lesson": trial.user_attrs["lesson"], "value": value,
        "state": trial.state.name.lower(), "seconds": trial.user_attrs["seconds"],
        "chosen": "yes" if trial.number == best.number else "",
    }  # fmt: skip


def _has_temperature(term: Term) -> bool:
    return bool(term.weight) and hasattr(term.loss, "temperature")


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingPackage(
            "tuning needs the package `optuna`", "pip install lighten[tune]"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
