"""What this machine has left, and whether a run can begin: disk, memory, a writable output."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lighten.errors import NoRoom, WrongUse

MB = 10**6


def preflight(out: Path, *, disk: int = 0, memory: int = 0) -> None:
    """Refuse before work starts: `out` must be writable and `disk`, `memory` bytes must be free.

    Where the free memory cannot be found out, it is not checked. Raises WrongUse, NoRoom.
    """
    parent = _standing(out)
    if not parent.is_dir():
        raise WrongUse(f"{out} cannot be made: {parent} is a file", "choose another --out")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        hint = "choose another --out, or change the permissions of that folder"
        raise WrongUse(f"cannot write in {parent}: {error.strerror}", hint) from error
    free = shutil.disk_usage(parent).free
    if free < disk:
        raise NoRoom(
            f"this run writes up to {_mb(disk)} under {parent}, but {_mb(free)} are free",
            f"free {_mb(disk - free)}, or choose an --out on another disk",
        )
    available = available_memory()
    if available is not None and available < memory:
        raise NoRoom(
            f"this run needs about {_mb(memory)} of memory, but {_mb(available)} are available",
            "close other programs, or lower --samples or --length",
        )


def available_memory() -> int | None:
    """Bytes that a new process can use without swapping; None where the system does not say."""
    try:
        import psutil

        return _capped(int(psutil.virtual_memory().available))
    except ImportError:
        pass
    try:
        if sys.platform == "darwin":
            return _macos_available()
        found = re.search(r"^MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
        return _capped(int(found[1]) * 1024) if found else None
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def peak_memory() -> int | None:
    """The most bytes that this process has held in memory so far; None where unknown."""
    if sys.platform == "win32":
        try:
            import psutil
        except ImportError:
            return None
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def _capped(available: int) -> int:
    # A container's limit is below what the machine's meminfo shows.
    # Source: Linux kernel, Documentation/admin-guide/cgroup-v2.rst, memory.max / memory.current.
    try:
        limit = _text("/sys/fs/cgroup/memory.max").strip()
        used = int(_text("/sys/fs/cgroup/memory.current"))
        cache = re.search(r"^inactive_file (\d+)", _text("/sys/fs/cgroup/memory.stat"), re.M)
    except (OSError, ValueError):
        return available
    if not limit.isdigit():
        return available
    return max(0, min(available, int(limit) - used + (int(cache[1]) if cache else 0)))


def _macos_available() -> int:
    # vm_stat counts pages; free and inactive ones can be had. *Source:* man vm_stat
    out = subprocess.run(["vm_stat"], capture_output=True, text=True, check=True, timeout=5).stdout
    page = int(re.search(r"page size of (\d+)", out)[1])  # type: ignore[index]
    kinds = ("free", "inactive", "speculative", "purgeable")
    pages = [re.search(rf"^Pages {kind}:\s+(\d+)", out, re.MULTILINE) for kind in kinds]
    return page * sum(int(found[1]) for found in pages if found)


def _standing(path: Path) -> Path:
    """The nearest of path and its parents that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _text(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def _mb(size: int) -> str:
    return f"{size / MB:,.0f} MB"
