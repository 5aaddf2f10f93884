"""A run that the first process of a training on several devices holds, as the others see it.

Lightning starts the user's script again for each other device, while the first process has the run
locked. These follow: they read what is stored, learn along, store nothing, and wait until the first
has stored the result.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lighten.atomic import JSON, dump, read_lines
from lighten.errors import BadOutput, ChangedRequest, WrongUse
from lighten.run import MANIFEST, Run

T = TypeVar("T")

HELD = "LIGHTEN_RUN_HELD"
"""Environment variable of processes that follow: the run's folder, and whose process holds it."""

PAUSE = 0.2
"""Seconds between two looks at what the first process has stored."""


class FollowedRun(Run):
    """Read only; what is not stored yet is computed, and not stored."""

    @classmethod
    def of(cls, folder: Path, request: Mapping[str, JSON]) -> FollowedRun:
        """Raises ChangedRequest where this process was asked for something else than the first."""
        run = cls.at(folder, lock=False)
        asked = dict(request)
        other = [k for k in sorted(asked | run.request) if _text(asked, k) != _text(run.request, k)]
        if other:
            raise ChangedRequest(
                f"the process for another device was asked for another {', '.join(other)}",
                "a script must make the same networks and data each time that it runs: call"
                " torch.manual_seed before it draws any",
            )
        return run  # type: ignore[return-value]

    def once(
        self, key: str, fn: Callable[[], T], *, save: Callable[[T, Path], None],
        load: Callable[[Path], T], given: JSON = None,
    ) -> T:  # fmt: skip
        return load(self.path(key)) if self.whole(key, given=given) else fn()

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Nothing: the first process says how long its stages took."""

    def wait(self, key: str) -> None:
        """Until the first process has stored `key`; raises BadOutput where it ended before."""
        first = int(os.environ[HELD].partition(":")[0])
        while not self.whole(key):
            if os.getppid() != first:
                raise BadOutput(
                    f"the process that holds {self.folder} ended before the run was done",
                    "what it said last is the reason",
                )
            time.sleep(PAUSE)
            for record in read_lines(self.folder / MANIFEST):
                self._learn(record)


@contextmanager
def led(run: Run) -> Iterator[None]:
    """While open, processes that this one starts follow it in the run."""
    if isinstance(run, FollowedRun):
        yield
        return
    os.environ[HELD] = _holder(os.getpid(), run.folder)
    try:
        yield
    finally:
        del os.environ[HELD]


def follows(folder: Path) -> bool:
    """Whether this process was started by the one that holds the run, to learn along with it."""
    return os.environ.get(HELD) == _holder(os.getppid(), folder)


def check_processes(folder: Path) -> None:
    """Raises WrongUse where the script runs in several processes that were not started for this
    run: each would want to hold it, and wait for the others."""
    started = "LOCAL_RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if started and not follows(folder):
        raise WrongUse(
            f"{folder} cannot be learned on several devices here: this script runs in several"
            " processes already",
            "lighten starts them itself: leave torchrun or srun out, and let one training in a"
            " script use several devices",
        )


def _holder(process: int, folder: Path) -> str:
    return f"{process}:{folder.resolve()}"


def _text(request: Mapping[str, JSON], key: str) -> str:
    return dump(request.get(key))
