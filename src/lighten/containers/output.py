"""An output is whole or absent: written beside its place, then moved there in one step."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lighten.errors import NoRoom, UserError, WrongUse


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write to; it takes the place of `path` when all went well.

    Raises WrongUse where nothing can be written, NoRoom where the disk is full.
    """
    with _user_errors(path):
        if path.is_dir():
            raise WrongUse(f"`{path}` is a folder", "give the name of the file to write")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        part = Path(name)
        try:
            yield part
            _settle(part)
            part.chmod(0o666 & ~_umask())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling folder to fill; it takes the place of `path` when all went well.

    A folder that already stands there is replaced only when the new one has every file of it:
    somebody's other files are never deleted (WrongUse).
    """
    with _user_errors(path):
        if path.exists() and not path.is_dir():
            raise WrongUse(f"`{path}` is a file", "give the name of the folder to write")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        old = part.with_suffix(".old")
        try:
            yield part
            for file in part.iterdir():
                _settle(file)
            part.chmod(0o777 & ~_umask())
            foreign = _names(path) - _names(part)
            if foreign:
                raise WrongUse(
                    f"`{path}` has files of its own, such as `{min(foreign)}`",
                    "name another folder; lighten replaces only what it would write itself",
                )
            if path.exists():
                os.replace(path, old)
            os.replace(part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} if folder.exists() else set()


def _settle(file: Path) -> None:
    """Bytes on the disk before the name: a power cut must not leave a named file of zeros."""
    with file.open("rb+") as f:
        os.fsync(f.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _user_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoRoom(
                f"no room to write `{path}`: {error.strerror}", "free some disk space"
            ) from error
        raise WrongUse(
            f"`{path}` cannot be written: {error.strerror or error}", "choose another place"
        ) from error
