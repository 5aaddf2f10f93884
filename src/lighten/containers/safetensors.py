"""The safetensors layout, written tensor by tensor: the header needs shapes and dtypes only.

    u64 length of the header | header (JSON, padded with spaces to 8) | tensors, back to back

*Source:* the safetensors README, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lighten.errors import BadOutput

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
T = TypeVar("T")
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: all that is known before its numbers are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def header(entries: Sequence[Entry]) -> bytes:
    """Length and header. `format: pt` is what transformers asks for."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for e in entries:
        offsets = [at, at + e.nbytes]
        table[e.name] = {"dtype": DTYPES[e.dtype], "shape": e.shape, "data_offsets": offsets}
        at += e.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(path: Path, entries: Sequence[Entry], load: Callable[[str], Tensor]) -> None:
    """One file; `load` gives the numbers of one tensor at a time."""
    with path.open("wb") as file:
        file.write(header(entries))
        for e in entries:
            t = load(e.name)
            if t.dtype != e.dtype or tuple(t.shape) != tuple(e.shape):
                raise BadOutput(
                    f"tensor `{e.name}` came as {t.dtype} {tuple(t.shape)},"
                    f" not as announced, {e.dtype} {tuple(e.shape)}"
                )
            file.write(raw_bytes(t))


def raw_bytes(t: Tensor) -> memoryview:
    """The bytes of t in row order, little-endian as every machine torch runs on."""
    flat: Any = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


@dataclass(frozen=True)
class Shards:
    """Which tensor goes into which file: one, or several of at most `limit` bytes and an index."""

    files: Mapping[str, Sequence[Entry]]

    @classmethod
    def of(cls, entries: Iterable[Entry], limit: int = SHARD_BYTES) -> Shards:
        groups: list[list[Entry]] = [[]]
        size = 0
        for e in entries:
            if groups[-1] and size + e.nbytes > limit:
                groups.append([])
                size = 0
            groups[-1].append(e)
            size += e.nbytes
        if len(groups) == 1:
            return cls({"model.safetensors": groups[0]})
        n = len(groups)
        return cls({f"model-{i:05}-of-{n:05}.safetensors": g for i, g in enumerate(groups, 1)})

    def index(self) -> bytes | None:
        """The index file, where there is more than one shard."""
        if len(self.files) == 1:
            return None
        where = {e.name: file for file, entries in self.files.items() for e in entries}
        total = sum(e.nbytes for entries in self.files.values() for e in entries)
        body = {"metadata": {"total_size": total}, "weight_map": where}
        return (json.dumps(body, indent=2) + "\n").encode()

    def nbytes(self) -> int:
        """Bytes of all files, the index counted."""
        size = len(self.index() or b"")
        for entries in self.files.values():
            size += len(header(entries)) + sum(e.nbytes for e in entries)
        return size

    def write(self, folder: Path, load: Callable[[str], Tensor]) -> None:
        for file, entries in self.files.items():
            write(folder / file, entries, load)
        index = self.index()
        if index is not None:
            (folder / INDEX).write_bytes(index)


class Lazy(Mapping[str, T]):
    """Names -> what is loaded when it is asked for, one at a time."""

    def __init__(self, names: Iterable[str], load: Callable[[str], T]) -> None:
        self._names = dict.fromkeys(names)
        self._load = load

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


Tensors = Lazy[Tensor]
