"""The talk on stderr: progress bars, notes, and plain lines where nobody watches.

stdout belongs to data. A stage says nothing in its first two seconds; after that a terminal shows
a bar, and anything else gets one plain line when the stage ends. NO_COLOR is honoured (by rich).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PATIENCE = 2.0
"""Seconds that a stage may take before it is worth a word."""

_console = Console(stderr=True, highlight=False)
_lock = threading.RLock()
_bars: Progress | None = None
_quiet = False
_open = 0
_heard: list[tuple[int, Callable[[str, float], None]]] = []


def be_quiet(quiet: bool = True) -> None:
    """Say nothing but errors from now on (`--quiet`)."""
    global _quiet
    _quiet = quiet


def note(text: str) -> None:
    """One line of talk, printed above the bars."""
    if not _quiet:
        _console.print(Text(text), soft_wrap=True)


def complain(message: str, hint: str = "") -> None:
    """An error and its hint, also when quiet."""
    _console.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    if hint:
        _console.print(Text.assemble(("hint: ", "bold cyan"), hint), soft_wrap=True)


class Tick:
    """Counts the steps of a stage: `tick()` is one more, `tick(4)` four more."""

    def __init__(self, name: str, total: int | None, unit: str) -> None:
        self.name = name
        self.total = total
        self.unit = unit
        self.done = 0
        self._began = time.monotonic()
        self._bar: tuple[Progress, TaskID] | None = None
        self._hidden = _quiet or not _console.is_terminal
        self._timer = None if self._hidden else threading.Timer(PATIENCE, self._show)
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()

    def __call__(self, steps: int = 1) -> None:
        with _lock:
            self.done += steps
            if self._bar is not None:
                self._bar[0].update(self._bar[1], completed=self.done, total=self.total)

    def line(self, seconds: float) -> str:
        """What a stage that took so long leaves behind: `calibrate 30/30 blocks 41 s`."""
        of = "" if self.total is None else f"/{self.total}"
        count = f"{self.done}{of} {self.unit}".rstrip() if self.total or self.done else ""
        return " ".join(part for part in (self.name, count, duration(seconds)) if part)

    def _show(self) -> None:
        global _bars
        with _lock:
            if self._hidden:  # the stage ended while its timer fired
                return
            if _bars is None:
                _bars = _new_bars()
                _bars.start()
            task = _bars.add_task(self.name, total=self.total, completed=self.done)
            self._bar = (_bars, task)

    def _close(self, ended: bool) -> float:
        global _bars
        if self._timer is not None:
            self._timer.cancel()
        with _lock:
            self._hidden = True
            if self._bar is not None:
                bars, task = self._bar
                bars.remove_task(task)
                self._bar = None
                if not bars.tasks:
                    bars.stop()
                    _bars = None
        seconds = time.monotonic() - self._began
        if ended and seconds >= PATIENCE:
            note(self.line(seconds))
        return seconds


@contextmanager
def stage(name: str, total: int | None = None, unit: str = "") -> Iterator[Tick]:
    """A piece of work of `total` steps; stages nest, and an inner one shows below its outer one.

    >>> with stage("calibrate", total=2, unit="blocks") as tick:
    ...     tick()
    ...     tick()
    >>> tick.line(41.2)
    'calibrate 2/2 blocks 41 s'
    """
    global _open
    tick = Tick(name, total, unit)
    ended = False
    _open += 1
    try:
        yield tick
        ended = True
    finally:
        _open -= 1
        seconds = tick._close(ended)
    for around, hear in list(_heard):
        if _open == around:
            hear(name, seconds)


@contextmanager
def heard(ended: Callable[[str, float], None]) -> Iterator[None]:
    """While open, `ended(name, seconds)` is called for every stage that ends well.

    Not for those within others that began meanwhile.
    """
    listener = (_open, ended)
    _heard.append(listener)
    try:
        yield
    finally:
        _heard.remove(listener)


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(3.21), duration(41.2), duration(125.0), duration(7384.0)
    ('3.2 s', '41 s', '2 min 5 s', '2 h 3 min')
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _new_bars() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=_console,
        transient=True,
        refresh_per_second=4,
    )
