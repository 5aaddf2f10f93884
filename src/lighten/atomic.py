"""Files that are whole or absent: digest, sync, move into place; and the JSON written in them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lighten.errors import NoRoom
from lighten.progress import note

JSON = Any
"""None, bool, int, float, str, or lists and str-keyed dicts of these."""


def place(target: Path, partial: Path, write: Callable[[Path], None]) -> tuple[str, int]:
    """Let `write` make a file or folder in `partial`, then move it to `target` in one step.

    Returns its digest. Raises NoRoom where the disk is full.
    """
    partial.mkdir(exist_ok=True)
    room = Path(tempfile.mkdtemp(dir=partial))
    made = room / target.name
    try:
        write(made)
        for path in _files(made):
            sync(path)
        found = digest(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir() or (made.is_dir() and target.exists()):
            os.replace(target, room / ".old")  # a folder cannot be replaced in one step
        os.replace(made, target)
        sync(target.parent)
    except Exception as error:
        if full := no_room(error, target):
            raise full from error
        raise
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return found


def digest(path: Path) -> tuple[str, int]:
    """sha256 and bytes of a file, or of a folder's names and files in sorted order."""
    whole = hashlib.sha256()
    size = 0
    for file in _files(path):
        one = whole if path.is_file() else hashlib.sha256()
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 20):
                one.update(chunk)
                size += len(chunk)
        if one is not whole:
            whole.update(f"{file.relative_to(path).as_posix()}\0{one.hexdigest()}\n".encode())
    return whole.hexdigest(), size


def _files(path: Path) -> Sequence[Path]:
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file())


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def no_room(error: Exception, path: Path) -> NoRoom | None:
    """The error to raise instead where the disk is full, else None."""
    # safetensors reports an OSError only in its text.
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if not full and f"os error {errno.ENOSPC}" not in str(error):
        return None
    hint = "free some and run the same line again: what is done stays done"
    return NoRoom(f"the disk is full; {path} was not written", hint)


def read_lines(path: Path) -> list[dict[str, JSON]]:
    """The whole lines of a JSON-lines file that are objects; a torn last line is no line."""
    if not path.exists():
        return []
    rows: list[dict[str, JSON]] = []
    lost = 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            lost += 1
    if lost:
        note(f"{path}: {lost} damaged lines are passed over")
    return rows


def file_name(part: str) -> str:
    """A path component for any text: odd characters percent-encoded, long names shortened."""
    name = quote(part, safe=" !#$&'()+,;=@[]{}~", errors="surrogatepass")
    if len(name) <= 180:
        return name
    stem, dot, suffix = name[:140], ".", name.rpartition(".")[2]
    tail = dot + suffix if len(suffix) < 16 else ""
    return f"{stem}-{sha256(name.encode())[:16]}{tail}"


def sha256(data: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def dump(value: JSON) -> str:
    """JSON for a file that people read, keys in the order that they were put in."""
    return json.dumps(value, indent=1) + "\n"


def as_line(row: Mapping[str, JSON]) -> bytes:
    """One line of a JSON-lines file."""
    return json.dumps(dict(row)).encode() + b"\n"


def write_text(path: Path, text: str) -> None:
    """UTF-8, with no translation of line ends."""
    path.write_bytes(text.encode())
