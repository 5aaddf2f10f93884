"""The run directory: every file in it is whole or absent, and the same request resumes it.

    request.json  manifest.jsonl  candidates.jsonl  plan.json  weights/<layer>.safetensors  model/
    exports/  metrics.json

A stage writes beside its target (in .partial/), syncs, moves the file into place, then adds a line
with its sha256 to the manifest. A kill between any two of these leaves either nothing or a file
that no line vouches for, and such a file is computed again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lighten.atomic import (
    JSON,
    as_line,
    digest,
    dump,
    file_name,
    no_room,
    place,
    read_lines,
    sha256,
    sync,
    write_text,
)
from lighten.errors import BadInput, ChangedRequest, WrongUse
from lighten.preflight import peak_memory
from lighten.progress import note
from lighten.run_lock import acquire

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

ANY: Any = object()
"""Stands for whatever a stored result was given."""

REQUEST, MANIFEST, PARTIAL, LOCK = "request.json", "manifest.jsonl", ".partial", ".lock"


class Run:
    """One run directory, held by one process; made by `open` or `at`, freed by `close`."""

    def __init__(self, folder: Path, request: JSON, lock: int | None) -> None:
        self.folder = folder
        self.request = request
        self._records: dict[str, dict[str, JSON]] = {}
        self._pieces: dict[str, list[dict[str, JSON]]] = {}
        self._checked: set[str] = set()
        self._release = weakref.finalize(self, os.close, lock) if lock is not None else None
        for record in read_lines(folder / MANIFEST):
            self._learn(record)

    @classmethod
    def open(cls, folder: Path | str, request: Mapping[str, JSON]) -> Run:
        """Create the run, or resume it when `request` equals the one that it was begun with.

        Raises ChangedRequest (naming the fields that differ), WrongUse (not a run, not writable,
        in use by another process).
        """
        folder = Path(folder)
        asked = json.loads(dump(dict(request)))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WrongUse(
                f"cannot make {folder}: {error.strerror}", "choose another --out"
            ) from error
        stranger = {p.name for p in folder.iterdir()} - {LOCK, PARTIAL}
        if stranger and not (folder / REQUEST).exists():
            raise WrongUse(
                f"{folder} is not empty and not a run of lighten (it holds {min(stranger)})",
                "choose another --out",
            )
        lock = acquire(folder / LOCK)
        try:
            if (folder / REQUEST).exists():
                _compare(folder, _read_request(folder), asked)
            run = cls(folder, asked, lock)
        except BaseException:
            os.close(lock)
            raise
        run._sweep()
        if not (folder / REQUEST).exists():
            text = dump(asked)
            place(folder / REQUEST, folder / PARTIAL, lambda path: write_text(path, text))
        return run

    @classmethod
    def at(cls, folder: Path | str, *, lock: bool = True) -> Run:
        """An existing run with the request that it was begun with; `lock=False` only to read it.

        Raises WrongUse where there is none, BadInput where its request is damaged.
        """
        folder = Path(folder)
        if not (folder / REQUEST).is_file():
            hint = "name the folder that `lighten compress` wrote (its --out)"
            raise WrongUse(f"{folder} is not a run: it holds no {REQUEST}", hint)
        request = _read_request(folder)
        return cls.open(folder, request) if lock else cls(folder, request, None)

    def close(self) -> None:
        """Let another process have the run."""
        if self._release is not None:
            self._release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def once(
        self,
        key: str,
        fn: Callable[[], T],
        *,
        save: Callable[[T, Path], None],
        load: Callable[[Path], T],
        given: JSON = None,
    ) -> T:
        """The stored result under path `key` where it is there and whole, else fn()'s, stored.

        given: what the result depends on beyond the request (a layer's spec, say); a result that
        was stored for another `given` is computed again. save may write a file or a folder.
        Raises NoRoom where the disk is full.
        """
        if self.whole(key, given=given):
            return load(self.path(key))
        self._must_hold()
        began = time.monotonic()
        result = fn()
        target = self.path(key)
        found, size = place(target, self.folder / PARTIAL, lambda path: save(result, path))
        self._record(
            {
                "key": key,
                "sha256": found,
                "bytes": size,
                "given": _fingerprint(given),
                "seconds": round(time.monotonic() - began, 3),
                "peak_mb": round((peak_memory() or 0) / 1e6, 1) or None,
            }
        )
        return result

    def json(self, key: str, fn: Callable[[], JSON], *, given: JSON = None) -> JSON:
        """`<key>.json`; the result is what JSON makes of it (tuples come back as lists)."""
        return self.once(
            f"{key}.json",
            lambda: json.loads(dump(fn())),
            save=lambda value, path: write_text(path, dump(value)),
            load=lambda path: json.loads(path.read_text(encoding="utf-8")),
            given=given,
        )

    def tensors(
        self, key: str, fn: Callable[[], Mapping[str, Tensor]], *, given: JSON = None
    ) -> dict[str, Tensor]:
        """`<key>.safetensors`; loaded tensors are on the CPU, computed ones where fn left them."""
        from safetensors.torch import load_file, save_file

        return self.once(
            f"{key}.safetensors",
            lambda: dict(fn()),
            save=lambda value, path: save_file(_storable(value), path),
            load=lambda path: dict(load_file(path)),
            given=given,
        )

    def file(self, key: str, fn: Callable[[Path], None], *, given: JSON = None) -> Path:
        """The file or folder that fn wrote; fn is given a temporary path of the same name."""
        return self.once(
            key,
            lambda: self.path(key),
            save=lambda _, path: fn(path),
            load=lambda path: path,
            given=given,
        )

    def whole(self, key: str, *, given: JSON = ANY) -> bool:
        """Whether `key` is stored for this `given` with the bytes that the manifest vouches for.

        Without `given` it may have been stored for any.
        """
        record = self._records.get(key)
        if record is None or (given is not ANY and record.get("given") != _fingerprint(given)):
            return False
        path = self.path(key)
        if not path.exists():
            note(f"{key} is gone from {self.folder}; it is computed again")
            return False
        if digest(path) != (record.get("sha256"), record.get("bytes")):
            note(f"{key} in {self.folder} was cut or changed; it is computed again")
            return False
        return True

    def path(self, key: str) -> Path:
        """Where `key` is stored. Raises WrongUse for a key that would leave the folder."""
        parts = key.split("/")
        names = [file_name(part) for part in parts]
        if any(part in ("", ".", "..") for part in parts) or names[0] in _RESERVED:
            raise WrongUse(f"`{key}` cannot name a file of a run", "use a relative path")
        return self.folder.joinpath(*names)

    def append(self, name: str, rows: Iterable[Mapping[str, JSON]]) -> None:
        """Add lines to `<name>.jsonl`; after a kill either all rows of one call are there or none.

        Whatever stands behind the last whole call (a torn write) is cut off first.
        """
        self._must_hold()
        path = self.path(f"{name}.jsonl")
        if name not in self._checked:
            self._sound(name)
        start = sum(piece["bytes"] for piece in self._pieces.get(name, []))
        data = b"".join(as_line(row) for row in rows)
        try:
            with open(path, "r+b" if path.exists() else "x+b") as file:
                file.truncate(start)
                file.seek(start)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            sync(self.folder)
        except OSError as error:
            if full := no_room(error, path):
                raise full from error
            raise
        self._record({"piece": name, "start": start, "bytes": len(data), "sha256": sha256(data)})

    def read(self, name: str) -> list[dict[str, JSON]]:
        """The rows of `<name>.jsonl` up to the first that is torn or changed (said in a note)."""
        sound = self._sound(name)
        if not sound:
            return []
        data = self.path(f"{name}.jsonl").read_bytes()[: sum(p["bytes"] for p in sound)]
        return [json.loads(line) for line in data.splitlines()]

    def status(self) -> dict[str, JSON]:
        """What is done: {"folder", "request", "done": [{key, bytes, seconds, peak_mb}], "rows"}."""
        shown = ("key", "bytes", "seconds", "peak_mb")
        done = [
            {k: record.get(k) for k in shown}
            for key, record in self._records.items()
            if self.path(key).exists()
        ]
        rows = {name: len(self.read(name)) for name in self._pieces}
        return {"folder": str(self.folder), "request": self.request, "done": done, "rows": rows}

    def _sound(self, name: str) -> list[dict[str, JSON]]:
        """The longest prefix of appended pieces that the file still holds unchanged."""
        path = self.path(f"{name}.jsonl")
        pieces = self._pieces.get(name, [])
        sound: list[dict[str, JSON]] = []
        end = 0
        if pieces and path.is_file():
            size = path.stat().st_size
            with open(path, "rb") as file:
                for piece in pieces:
                    if piece["start"] != end or end + piece["bytes"] > size:
                        break
                    if sha256(file.read(piece["bytes"])) != piece["sha256"]:
                        break
                    sound.append(piece)
                    end += piece["bytes"]
        if len(sound) < len(pieces):
            note(f"{name}.jsonl in {self.folder} was cut or changed; the rest is computed again")
            self._pieces[name] = sound
        self._checked.add(name)
        return sound

    def _must_hold(self) -> None:
        if self._release is None or not self._release.alive:
            raise RuntimeError(f"{self.folder} was opened to be read, or closed")

    def _learn(self, record: Mapping[str, JSON]) -> None:
        """Take in one line of the manifest; what this class did not write is passed over."""
        try:
            self.path(str(record.get("key") or record.get("piece")))
        except WrongUse:
            return
        if isinstance(name := record.get("piece"), str):
            start, size = record.get("start"), record.get("bytes")
            if isinstance(start, int) and isinstance(size, int) and size >= 0:
                kept = [p for p in self._pieces.get(name, []) if p["start"] < start]
                piece = {"start": start, "bytes": size, "sha256": record.get("sha256")}
                self._pieces[name] = [*kept, piece]
        elif isinstance(key := record.get("key"), str):
            self._records[key] = dict(record)

    def _record(self, record: dict[str, JSON]) -> None:
        path = self.folder / MANIFEST
        with open(path, "ab") as file:
            file.write(as_line(record))
            file.flush()
            os.fsync(file.fileno())
        self._learn(record)

    def _sweep(self) -> None:
        """Remove what a killed process left half-written, the manifest's torn last line too."""
        shutil.rmtree(self.folder / PARTIAL, ignore_errors=True)
        path = self.folder / MANIFEST
        if path.exists():
            data = path.read_bytes()
            if not data.endswith(b"\n"):
                os.truncate(path, data.rfind(b"\n") + 1)


def default_folder(model: str, budget: str | None, max_kld: float | None = None) -> Path:
    """Where a run goes that was given no --out. Raises WrongUse where nothing is asked for.

    >>> default_folder("org/SmolLM2", "80 MB").as_posix()
    'runs/SmolLM2-80MB'
    """
    if budget is None and max_kld is None:
        hint = "say --budget 80MB, --budget 4.5bpw, --budget 25% or --max-kld 0.05"
        raise WrongUse("there is neither a budget nor a loss to keep to", hint)
    wish = budget.replace(" ", "").replace("%", "pc") if budget else f"kld{max_kld:g}"
    name = Path(model).resolve().name.removesuffix(".gguf") or "model"
    return Path("runs") / file_name(f"{name}-{wish}")


_RESERVED = {REQUEST, MANIFEST, PARTIAL, LOCK}


def _compare(folder: Path, stored: JSON, asked: JSON) -> None:
    before, after = _flat(stored), _flat(asked)
    changed = [
        f"{field}: {before.get(field, 'unset')} -> {after.get(field, 'unset')}"
        for field in sorted(before.keys() | after.keys())
        if before.get(field) != after.get(field)
    ]
    if changed:
        advice = "Ask for the same again to resume, or use another --out"
        if changed[0].startswith("budget:") and len(changed) == 1:
            advice += f"; `lighten plan {folder} --budget ...` spends another budget in this run"
        raise ChangedRequest(
            f"{folder} was begun for another request", f"{'; '.join(changed)}. {advice}"
        )


def _flat(value: JSON, prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted field -> JSON text."""
    if not isinstance(value, dict) or not value:
        return {prefix.rstrip("."): json.dumps(value)}
    flat: dict[str, str] = {}
    for field, inner in value.items():
        flat |= _flat(inner, f"{prefix}{field}.")
    return flat


def _read_request(folder: Path) -> JSON:
    path = folder / REQUEST
    try:
        request = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = f"delete {folder} to begin again, or use another --out"
        raise BadInput(f"{path} cannot be read: {error}", hint) from error
    if not isinstance(request, dict):
        raise BadInput(f"{path} is not a request", "use another --out")
    return request


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors wants them: on the CPU, contiguous, none sharing its memory."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        t = tensor.detach().cpu().contiguous()
        if t.untyped_storage().data_ptr() in seen:
            t = t.clone()
        seen.add(t.untyped_storage().data_ptr())
        out[name] = t
    return out


def _fingerprint(given: JSON) -> str | None:
    return None if given is None else sha256(json.dumps(given, sort_keys=True).encode())[:16]
