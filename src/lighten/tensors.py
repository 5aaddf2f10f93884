"""Weights on disk, read one at a time: `LazyTensor`, and safetensors files behind it.

Files are read with seek and read, not mapped: pages of a mapping count as memory of the process
until the kernel wants them back, and a walk through a model would seem to hold all of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lighten.errors import BadInput

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still on disk.

    dtype: of what `load` returns (of `scaled`: what it is stored as again; it loads as float32).
    stored: its type in the file ("BF16", "Q4_K"). nbytes: what it takes there, at `at` (a file and
    an offset). read(a, b): rows a..b of the first dimension.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: str
    nbytes: int
    at: tuple[Path, int]
    read: Callable[[int, int], Tensor]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def load(self) -> Tensor:
        """The whole tensor, in memory of its own."""
        return self.read(0, self.shape[0]) if self.shape else self.read(0, 1)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the first dimension."""
        return self.read(max(start, 0), min(stop, self.shape[0]))


def held(value: Tensor, stored: LazyTensor) -> LazyTensor:
    """A tensor in memory that stands where `stored` was, with its name and place."""

    def read(start: int, stop: int) -> Tensor:
        return value[start:stop].clone() if value.dim() else value.clone()

    return replace(stored, dtype=value.dtype, read=read)


def scaled(stored: LazyTensor, first: Tensor | None, last: Tensor | None = None) -> LazyTensor:
    """A tensor times `first` (along its first dimension) and `last` (along its last), multiplied in
    float32 whenever it is read, and not rounded to its type again before it is stored."""

    def read(start: int, stop: int) -> Tensor:
        value = stored.read(start, stop).float()
        if first is not None:
            value *= first[start:stop].view(-1, *[1] * (value.dim() - 1))
        return value if last is None else value.mul_(last)

    return replace(stored, read=read)


def read_bytes(path: Path, offset: int, count: int) -> Tensor:
    """(count,) uint8 from a file; raises BadInput if the file ends before."""
    out = np.empty(count, np.uint8)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            view, done = memoryview(out.data), 0
            while done < count:  # one read gives at most 2 GiB on Linux
                got = file.readinto(view[done:])
                if not got:
                    break
                done += got
    except OSError as error:
        raise BadInput(
            f"cannot read {path}: {error.strerror}", "is the file still there?"
        ) from error
    if done < count:
        raise BadInput(
            f"{path} ends at byte {offset + done}, {count - done} bytes before its tensor does",
            "the file is truncated or changed while it was read: download it again",
        )
    return torch.from_numpy(out)


def read_plain(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor stored as plain numbers, C order, little-endian."""
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    raw = read_bytes(path, offset, math.prod(shape) * dtype.itemsize)
    return raw.view(dtype).view(shape)


def safetensors_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file, its header validated; raises BadInput.

    *Source:* the safetensors format: u64 header length, JSON header, data without holes.
    """
    header, start, size = _header(path)
    tensors: dict[str, LazyTensor] = {}
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor, end = _entry(path, name, entry, start)
        tensors[name] = tensor
        spans.append((tensor.at[1] - start, end, name))
    here = 0
    for begin, end, name in sorted(spans):
        if begin != here:
            what = "overlaps the one before" if begin < here else "leaves a hole before it"
            raise _damaged(path, f"tensor `{name}` {what}")
        here = end
    if start + here != size:
        raise _damaged(path, f"{size - start} bytes of data where the header says {here}")
    return tensors


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(header, where data starts, size of the file)."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}", "check the path") from error
    if size < 8:
        raise _damaged(path, f"{size} bytes are too few for a header")
    length = int.from_bytes(bytes(read_bytes(path, 0, 8).tolist()), "little")
    if length > min(size - 8, _HEADER_LIMIT):
        raise _damaged(path, f"header of {length} bytes in a file of {size}")
    raw = read_bytes(path, 8, length).numpy().tobytes()
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header, 8 + length, size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name appears twice")
    return out


def _entry(path: Path, name: str, entry: Any, start: int) -> tuple[LazyTensor, int]:
    """One line of the header -> (tensor, where its data ends, from `start`)."""
    try:
        stored, shape = entry["dtype"], entry["shape"]
        begin, end = entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(path, f"tensor `{name}` has no dtype, shape and two offsets") from error
    numbers = [begin, end, *shape] if isinstance(shape, list) else [None]
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise _damaged(path, f"tensor `{name}` has sizes {shape} or offsets {[begin, end]}")
    dtype = DTYPES.get(stored) if isinstance(stored, str) else None
    if dtype is None:
        hint = f"known: {', '.join(DTYPES)}"
        raise BadInput(f"tensor `{name}` of {path} has the unknown type {stored!r}", hint)
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise _damaged(path, f"tensor `{name}` of shape {shape}, {stored}: {end - begin} bytes")
    at, width = start + begin, math.prod(shape[1:]) * dtype.itemsize

    def read(a: int, b: int) -> Tensor:
        size = (max(b - a, 0), *shape[1:]) if shape else ()
        return read_plain(path, at + a * width if shape else at, size, dtype)

    return LazyTensor(name, tuple(shape), dtype, stored, end - begin, (path, at), read), end


def _damaged(path: Path, what: str) -> BadInput:
    hint = "the file is damaged or not a safetensors file: download it again"
    return BadInput(f"{path} is not a whole safetensors file: {what}", hint)


def safetensors_folder(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of model.safetensors, or of the shards that its index names; raises BadInput."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() and not index.is_file():
        return safetensors_file(folder / "model.safetensors")
    if not index.is_file():
        raise _no_weights(folder)
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(placed.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{index} is damaged: {error}", "download it again") from error
    out: dict[str, LazyTensor] = {}
    for shard in shards:
        # a name with a path in it could reach out of the folder
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise BadInput(f"{index} names the shard {shard!r}", "a shard is a file beside it")
        if not (folder / shard).is_file():
            hint = f"one of {len(shards)} shards is missing: download the folder again"
            raise BadInput(f"{folder / shard} is not there", hint)
        for name, tensor in safetensors_file(folder / shard).items():
            if name in out:
                raise BadInput(f"tensor `{name}` is in two shards of {folder}", "which is right?")
            if placed.get(name) != shard:
                raise BadInput(f"{index} does not place tensor `{name}` in {shard}", "re-download")
            out[name] = tensor
    lost = sorted(set(placed) - set(out))
    if lost:
        raise BadInput(f"{index} places `{lost[0]}` where it is not", "download it again")
    return out


def _no_weights(folder: Path) -> BadInput:
    if list(folder.glob("*.bin")) or list(folder.glob("*.pth")):
        return BadInput(
            f"{folder} holds its weights as pickle files, which can run code when opened",
            "convert them where you trust them: load with transformers, save_pretrained writes "
            "safetensors",
        )
    gguf = sorted(folder.glob("*.gguf"))
    if gguf:
        return BadInput(f"{folder} holds GGUF files and no safetensors", f"give {gguf[0]}")
    return BadInput(f"{folder} has no model.safetensors", "is this the folder of a model?")
