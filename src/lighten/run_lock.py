"""A lock that dies with its process, so that two of them never share a run directory."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path

from lighten.errors import WrongUse


def acquire(path: Path) -> int:
    """Lock the file and return its descriptor; closing it (or the process's end) unlocks.

    Raises WrongUse where another process holds it or the folder is not writable.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise WrongUse(
            f"cannot write in {path.parent}: {error.strerror}", "choose another --out"
        ) from error
    try:
        _lock(handle)
    except OSError as error:
        holder = _holder(handle)
        os.close(handle)
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise WrongUse(
                f"{path.parent} lies on a file system without locks: {error.strerror}",
                "choose an --out on a local disk",
            ) from error
        raise WrongUse(
            f"{path.parent} is in use by another process{holder}",
            "wait for it, stop it, or use another --out",
        ) from error
    with contextlib.suppress(OSError):  # the number is only for the message above
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, str(os.getpid()).encode())
    return handle


def _holder(handle: int) -> str:
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        text = os.read(handle, 20).decode("ascii", "replace").strip()
    except OSError:
        return ""
    return f" (process {text})" if text.isdigit() else ""


def _lock(handle: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        # A byte far behind the process number, because Windows forbids reading a locked byte.
        os.lseek(handle, 4096, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
