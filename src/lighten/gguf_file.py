"""GGUF files: a header read with suspicion, and tensors dequantised one at a time.

*Source:* the GGUF specification (ggml, docs/gguf.md): little-endian; magic, version, counts,
key-value pairs, tensor infos, padding, tensor data at multiples of `general.alignment`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from lighten.errors import BadInput
from lighten.tensors import LazyTensor, read_bytes, read_plain

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING, _ARRAY = 8, 9
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_CHUNK = 1 << 22  # weights dequantised at a time, so that scratch memory stays small
_LONGEST_NAME = 64  # bytes, ggml's GGML_MAX_NAME


@dataclass(frozen=True)
class GgufFile:
    """metadata: key -> value (bool, int, float, str or a list of one of them). types: key ->
    (type, type of the elements or None) as the numbers of gguf.GGUFValueType."""

    path: Path
    version: int
    alignment: int
    data_start: int
    metadata: dict[str, Any]
    types: dict[str, tuple[int, int | None]]
    tensors: dict[str, LazyTensor] = field(repr=False)

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])


class _Cursor:
    """Reads forward in a file and never past its end."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size, self.at = path.stat().st_size, 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise self.damaged(f"{what} of {count} bytes at byte {self.at} of {self.size}")
        self.at += count
        return self.file.read(count)

    def number(self, kind: int, what: str) -> Any:
        layout = _SCALARS[kind]
        return layout.unpack(self.take(layout.size, what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.number(10, what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is not UTF-8: {raw[:40]!r}") from error

    def damaged(self, what: str) -> BadInput:
        hint = "the file is damaged or not what it seems: download it again"
        return BadInput(f"{self.path} is not a whole GGUF file: {what}", hint)


def read_gguf(path: Path) -> GgufFile:
    """The validated header of a GGUF file, its tensors still on disk; raises BadInput."""
    try:
        with path.open("rb") as file:
            return _read(_Cursor(file, path))
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}", "check the path") from error


def _read(c: _Cursor) -> GgufFile:
    if c.take(4, "magic") != b"GGUF":
        raise c.damaged("it does not start with GGUF")
    version = c.number(4, "version")
    if version not in (2, 3):
        swapped = version in (2 << 24, 3 << 24)
        what = "it is big-endian" if swapped else f"version {version}"
        raise BadInput(f"{c.path}: {what}", "lighten reads little-endian GGUF of versions 2 and 3")
    n_tensors, n_keys = c.number(10, "tensor count"), c.number(10, "key count")
    # a tensor info takes at least 24 bytes, a key at least 13
    if n_tensors * 24 + n_keys * 13 > c.size - c.at:
        raise c.damaged(f"{n_tensors} tensors and {n_keys} keys in {c.size} bytes")
    metadata: dict[str, Any] = {}
    types: dict[str, tuple[int, int | None]] = {}
    for _ in range(n_keys):
        key = c.string("key")
        if not key or key in metadata:
            raise c.damaged(f"key `{key}` is empty or appears twice")
        kind = c.number(4, key)
        metadata[key], element = _value(c, kind, key)
        types[key] = (kind, element)
    if not isinstance(metadata.get("general.architecture"), str):
        raise c.damaged("no `general.architecture`")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise c.damaged(f"alignment {alignment!r} is not a power of two")
    infos = [_info(c) for _ in range(n_tensors)]
    start = -(-c.at // alignment) * alignment
    return GgufFile(
        c.path, version, alignment, start, metadata, types, _place(c, infos, start, alignment)
    )


def _value(c: _Cursor, kind: int, key: str) -> tuple[Any, int | None]:
    """(value, type of its elements if it is an array)."""
    if kind in _SCALARS:
        return c.number(kind, key), None
    if kind == _STRING:
        return c.string(key), None
    if kind != _ARRAY:
        raise c.damaged(f"`{key}` has the unknown type {kind}")
    element, count = c.number(4, key), c.number(10, key)
    if element == _STRING:
        if count * 8 > c.size - c.at:
            raise c.damaged(f"`{key}` has {count} strings at byte {c.at} of {c.size}")
        return [c.string(key) for _ in range(count)], element
    if element not in _SCALARS:
        raise c.damaged(f"`{key}` is an array of type {element}")
    layout = _SCALARS[element]
    raw = c.take(count * layout.size, key)
    values = np.frombuffer(raw, np.dtype(layout.format))
    return values.tolist(), element


def _info(c: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape with the slowest dimension first, type, offset)."""
    name = c.string("tensor name")
    if not name or len(name.encode()) >= _LONGEST_NAME:
        raise c.damaged(f"tensor name `{name[:80]}`")
    dims = c.number(4, name)
    if not 1 <= dims <= 4:
        raise c.damaged(f"tensor `{name}` has {dims} dimensions")
    shape = tuple(c.number(10, name) for _ in range(dims))[::-1]
    if not all(0 < d < 2**48 for d in shape) or math.prod(shape) >= 2**48:
        raise c.damaged(f"tensor `{name}` has the shape {shape}")
    return name, shape, c.number(4, name), c.number(10, name)


def _place(
    c: _Cursor, infos: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
) -> dict[str, LazyTensor]:
    """Every tensor at its place, inside the file and beside the others."""
    tensors: dict[str, LazyTensor] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise c.damaged(f"tensor `{name}` appears twice")
        stored, block, size = _type(c, name, kind)
        if shape[-1] % block:
            raise c.damaged(f"tensor `{name}`: rows of {shape[-1]} in {stored} blocks of {block}")
        nbytes = math.prod(shape) // block * size
        if offset % alignment or start + offset + nbytes > c.size:
            where = f"{nbytes} bytes at {start + offset}"
            raise c.damaged(f"tensor `{name}` of {where} in a file of {c.size}")
        at, row = start + offset, shape[-1] // block * size
        read = _reader(c.path, name, shape, kind, stored, at, row)
        dtype = _PLAIN.get(stored, torch.float32)
        tensors[name] = LazyTensor(name, shape, dtype, stored, nbytes, (c.path, at), read)
    end, last = 0, ""
    for tensor in sorted(tensors.values(), key=lambda t: t.at[1]):
        if tensor.at[1] < end:
            raise c.damaged(f"tensors `{last}` and `{tensor.name}` overlap")
        end, last = tensor.at[1] + tensor.nbytes, tensor.name
    return tensors


def _type(c: _Cursor, name: str, kind: int) -> tuple[str, int, int]:
    """(name of the type, weights in a block, bytes of a block)."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        known = GGMLQuantizationType(kind)
        block, size = GGML_QUANT_SIZES[known]
    except (ValueError, KeyError) as error:
        raise c.damaged(f"tensor `{name}` has the unknown type {kind}") from error
    return known.name, block, size


def _reader(
    path: Path, name: str, shape: tuple[int, ...], kind: int, stored: str, at: int, row: int
) -> Callable[[int, int], Tensor]:
    """read(a, b) for a tensor whose innermost rows take `row` bytes."""
    inner = math.prod(shape[1:-1]) if len(shape) > 1 else 1
    columns = shape[-1]

    def read(a: int, b: int) -> Tensor:
        if len(shape) == 1:
            return _rows(path, name, kind, stored, at, row, 1, columns)[0][a:b].clone()
        count = max(b - a, 0) * inner
        out = _rows(path, name, kind, stored, at + a * inner * row, row, count, columns)
        return out.view(max(b - a, 0), *shape[1:])

    return read


def _rows(
    path: Path, name: str, kind: int, stored: str, at: int, row: int, count: int, columns: int
) -> Tensor:
    """(count, columns) from `at`, dequantised to float32 unless stored as plain floats."""
    if stored in _PLAIN:
        return read_plain(path, at, (count, columns), _PLAIN[stored])
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    out = torch.empty(count, columns)
    step = max(1, _CHUNK // columns)
    for begin in range(0, count, step):
        n = min(step, count - begin)
        raw = read_bytes(path, at + begin * row, n * row).numpy().reshape(n, row)
        try:
            with np.errstate(all="ignore"):  # what comes out NaN is named by who asked for it
                numbers = dequantize(raw, GGMLQuantizationType(kind))
        except NotImplementedError as error:
            hint = "requantize the file to another type, or open the model it was made from"
            raise BadInput(f"`{name}` of {path} is {stored}, unreadable here", hint) from error
        out[begin : begin + n] = torch.from_numpy(numbers)
    return out
