"""`lighten distill` killed again and again: python killed_distillation.py LINE PLACE...

LINE: its words as a JSON list. Each PLACE names where one process dies by SIGKILL; the next goes on
with what it left. They are `before:KEY` and `after:KEY` (the file of a run is about to be placed,
or in its place and not yet in the manifest), `state:N` (the N-th checkpoint), `report:N` (the N-th
look at held-out data within trials), `ended:N` (the N-th trial has ended and the study does not
know).
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.fabric  # noqa: F401  (what it takes is imported once, then forked)
import optuna
import torch.utils.tensorboard

from lighten import learn_state, run
from lighten.cli import main as lighten

# the modules, not the function: of networks and of language models
DISTILL: list[Any] = [
    importlib.import_module(f"lighten.{name}") for name in ("distill", "distill_language")
]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def counted(number: str) -> Callable[[], None]:
    """Dies at the call of this number, counted from 1."""
    left = int(number)

    def call() -> None:
        nonlocal left
        left -= 1
        if not left:
            die()

    return call


def aim(place: str) -> None:
    kind, _, what = place.partition(":")
    placed = learn_state.place
    if kind in ("before", "after"):

        def in_run(target: Path, *rest: Any) -> Any:
            named = what in target.name
            if named and kind == "before":
                die()
            found = placed(target, *rest)
            if named:
                die()
            return found

        run.place = in_run
        return
    call = counted(what)
    if kind == "state":

        def state(target: Path, *rest: Any) -> Any:
            if target.name.startswith("step-"):
                call()
            return placed(target, *rest)

        learn_state.place = state
    elif kind == "ended":
        noted = optuna.trial.Trial.set_user_attr

        def note(trial: Any, key: str, value: Any) -> None:
            noted(trial, key, value)
            if key == "outcome":
                call()

        optuna.trial.Trial.set_user_attr = note
    else:
        tuned = DISTILL[0].tuned

        def tune(lesson: Any, trials: int, learn: Any, *rest: Any) -> Any:
            def watched(lesson: Any, report: Any) -> float:
                def reported(value: float) -> None:
                    call()
                    report(value)

                return float(learn(lesson, reported))

            return tuned(lesson, trials, watched, *rest)

        for module in DISTILL:
            module.tuned = tune


def main() -> int:
    line, *places = sys.argv[1:]
    words = json.loads(line)
    torch.set_num_threads(1)
    for place in places:
        child = os.fork()
        if child == 0:
            try:
                aim(place)
                lighten(words)
            finally:
                os._exit(1)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
            print(f"not killed at {place}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
