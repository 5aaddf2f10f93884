"""Memory that one step of a training gives back and the next asks for again stays with the process.

glibc maps large tensors anew each time, and the kernel fills every page with zeros when it is first
touched: on a CPU that can take longer than what is then computed in them. Inside `kept_memory`
freed memory is kept instead, and given back at the end. Elsewhere (another libc, another system)
nothing is done.

*Source:* mallopt(3): M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and their defaults.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1
MOST_MAPPED = 32 * 2**20
"""To what glibc raises its threshold by itself, once blocks of that size were freed; it trims at
twice as much."""

_inside = 0


@contextmanager
def kept_memory() -> Iterator[None]:
    """While open, what is freed is kept by the process; at the end of the outermost, given back."""
    global _inside
    libc = _glibc()
    if libc is None:
        yield
        return
    if not _inside:
        libc.mallopt(MMAP_THRESHOLD, LARGEST)
        libc.mallopt(TRIM_THRESHOLD, LARGEST)
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1
        if not _inside:
            libc.mallopt(MMAP_THRESHOLD, MOST_MAPPED)
            libc.mallopt(TRIM_THRESHOLD, 2 * MOST_MAPPED)
            libc.malloc_trim(0)


def _glibc() -> Any:
    """The C library, where it has what is asked of it."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if all(hasattr(libc, name) for name in ("mallopt", "malloc_trim")) else None
