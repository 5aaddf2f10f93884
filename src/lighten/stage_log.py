"""How long each stage of a run took, and the memory it had by then: stages.jsonl.

with Run.open(...) as run, logged(run):
    ...                                 # every `stage` that ends is a line
spent(run)
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lighten import progress
from lighten.preflight import peak_memory
from lighten.run import Run

NAME = "stages"

WORTH = 0.1
"""Seconds from which on a stage is written down: a resumed run finds most of its stages done."""


@contextmanager
def logged(run: Run) -> Iterator[None]:
    """While open, stages that end are written down: what they are called, seconds, bytes."""

    def ended(name: str, seconds: float) -> None:
        if seconds < WORTH:
            return
        row = {"stage": name, "seconds": round(seconds, 3), "peak_memory_bytes": peak_memory()}
        run.append(NAME, [{**row, "ended": moment(time.time())}])

    with progress.heard(ended):
        yield


def spent(run: Run) -> list[dict[str, Any]]:
    """{"stage", "seconds", "peak_memory_bytes"} in the order in which stages first ended.

    A stage that was gone through in several calls is the sum of them. peak_memory_bytes: the most
    that the process had held when it ended.
    """
    stages: dict[str, dict[str, Any]] = {}
    for row in run.read(NAME):
        new = {"stage": row["stage"], "seconds": 0.0, "peak_memory_bytes": None}
        sums = stages.setdefault(row["stage"], new)
        sums["seconds"] = round(sums["seconds"] + row["seconds"], 3)
        peaks = [p for p in (sums["peak_memory_bytes"], row["peak_memory_bytes"]) if p is not None]
        sums["peak_memory_bytes"] = max(peaks, default=None)
    return list(stages.values())


def moment(seconds: float) -> str:
    """Seconds since 1970 as date and time, UTC.

    >>> moment(0)
    '1970-01-01T00:00:00Z'
    """
    when = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")
