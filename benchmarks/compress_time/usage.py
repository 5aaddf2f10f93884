"""What a stretch of work takes: wall and CPU seconds, and the peak memory of the process so far."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def used() -> Iterator[dict[str, float]]:
    """A dict that holds wall_seconds, cpu_seconds and peak_rss_bytes once the block is left."""
    found: dict[str, float] = {}
    wall, cpu = time.perf_counter(), _cpu()
    yield found
    found["wall_seconds"] = time.perf_counter() - wall
    found["cpu_seconds"] = _cpu() - cpu
    found["peak_rss_bytes"] = _peak()


def _cpu() -> float:
    """Of all threads, and of children that have ended."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def _peak() -> int:
    """VmHWM, which begins anew with a program; ru_maxrss keeps that of the one that started it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
