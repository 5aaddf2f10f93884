"""The GGUF layout (version 3, little-endian), written tensor by tensor.

    magic | u32 version | u64 tensors | u64 fields
    fields | tensor infos | padding | tensors, each padded

*Source:* ggml's docs/gguf.md; block sizes from the `gguf` package.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from lighten.containers.safetensors import raw_bytes
from lighten.errors import BadInput, BadOutput

MAGIC = b"GGUF"
ALIGNMENT = 32
DAMAGED = "the file is damaged or was not copied completely; fetch it again"


class Kind(IntEnum):
    """Types of field values."""

    U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


_PACK = {
    Kind.U8: "<B",
    Kind.I8: "<b",
    Kind.U16: "<H",
    Kind.I16: "<h",
    Kind.U32: "<I",
    Kind.I32: "<i",
    Kind.F32: "<f",
    Kind.BOOL: "<?",
    Kind.U64: "<Q",
    Kind.I64: "<q",
    Kind.F64: "<d",
}


@dataclass(frozen=True)
class Raw:
    """A field's type and value as another file has them."""

    payload: bytes


@dataclass(frozen=True)
class Typed:
    """A value whose GGUF type is said; `kind` of a list: of its elements."""

    value: Any
    kind: Kind


@dataclass(frozen=True)
class TensorInfo:
    """name; shape (out, in) as torch sees it; type: a ggml type's number."""

    name: str
    shape: tuple[int, ...]
    type: int

    @property
    def nbytes(self) -> int:
        block, size = block_layout(self.type)
        return math.prod(self.shape) // block * size


@cache
def block_layout(type: int) -> tuple[int, int]:
    """(weights, bytes) of one block of a ggml type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(type)]
    return int(block), int(size)


def pad(n: int, alignment: int = ALIGNMENT) -> int:
    """n rounded up to the alignment."""
    return -(-n // alignment) * alignment


# -- writing -----------------------------------------------------------------------------------
def string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _kind(value: Any) -> Kind:
    if isinstance(value, bool):
        return Kind.BOOL
    if isinstance(value, int):
        return Kind.I32 if value < 0 else Kind.U32
    if isinstance(value, float):
        return Kind.F32
    if isinstance(value, str):
        return Kind.STRING
    raise TypeError(f"no GGUF type for {type(value).__name__}")


def _scalar(value: Any, kind: Kind) -> bytes:
    return string(value) if kind is Kind.STRING else struct.pack(_PACK[kind], value)


def encode(value: Any) -> bytes:
    """Type and value. int -> u32 (i32 below zero and in lists), float -> f32, list -> array."""
    if isinstance(value, Raw):
        return value.payload
    kind: Kind | None = None
    if isinstance(value, Typed):
        value, kind = value.value, value.kind
    if isinstance(value, list | tuple):
        if kind is None:
            kind = Kind.STRING if not value else _kind(value[0])
            kind = Kind.I32 if kind is Kind.U32 else kind
        head = struct.pack("<IIQ", Kind.ARRAY, kind, len(value))
        return head + b"".join(_scalar(v, kind) for v in value)
    kind = _kind(value) if kind is None else kind
    return struct.pack("<I", kind) + _scalar(value, kind)


def header(
    fields: Mapping[str, Any], tensors: Sequence[TensorInfo], alignment: int = ALIGNMENT
) -> bytes:
    """All that stands before the first tensor's bytes, padding included."""
    out = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(fields)))
    for key, value in fields.items():
        out += string(key) + encode(value)
    at = 0
    for t in tensors:
        dims = t.shape[::-1]
        out += string(t.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        out += struct.pack("<IQ", t.type, at)
        at += pad(t.nbytes, alignment)
    return bytes(out) + bytes(pad(len(out), alignment) - len(out))


def write(
    path: Path,
    fields: Mapping[str, Any],
    tensors: Sequence[TensorInfo],
    load: Callable[[TensorInfo], Tensor],
    alignment: int = ALIGNMENT,
) -> None:
    """One file; `load` gives one tensor at a time, in its stored form."""
    with path.open("wb") as file:
        file.write(header(fields, tensors, alignment))
        for t in tensors:
            stored = raw_bytes(load(t))
            if stored.nbytes != t.nbytes:
                raise BadOutput(
                    f"tensor `{t.name}` came as {stored.nbytes} bytes, not as {t.nbytes}"
                )
            file.write(stored)
            file.write(bytes(pad(t.nbytes, alignment) - t.nbytes))


# -- reading -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Header:
    """What stands before the tensors. fields: as bytes, `value` decodes; offsets from the start."""

    fields: Mapping[str, Raw]
    tensors: Mapping[str, TensorInfo]
    offsets: Mapping[str, int]
    alignment: int

    def value(self, key: str, default: Any = None) -> Any:
        raw = self.fields.get(key)
        return default if raw is None else decode(raw)


def decode(raw: Raw) -> Any:
    """The value of a field that was read."""
    cursor = _Cursor(raw.payload, "field")
    return cursor.value(Kind(cursor.number("<I")))


def read_header(path: Path) -> Header:
    """Read and check the header; raises BadInput where sizes or offsets are out of range."""
    if path.stat().st_size < 24:
        raise BadInput(f"`{path}` is too short for a GGUF file", DAMAGED)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, str(path))
        if cursor.take(4) != MAGIC or cursor.number("<I") not in (2, 3):
            raise BadInput(f"`{path}` is no little-endian GGUF of version 2 or 3", DAMAGED)
        n_tensors, n_fields = cursor.number("<Q"), cursor.number("<Q")
        fields: dict[str, Raw] = {}
        for _ in range(cursor.count(n_fields, 13)):
            key = cursor.text()
            start = cursor.at
            cursor.skip(cursor.kind())
            fields[key] = Raw(bytes(data[start : cursor.at]))
        infos = []
        for _ in range(cursor.count(n_tensors, 24)):
            name, dims = cursor.text(), cursor.number("<I")
            if dims > 4:
                raise BadInput(f"`{path}`: tensor `{name}` has {dims} dimensions", DAMAGED)
            shape = tuple(cursor.number("<Q") for _ in range(dims))[::-1]
            infos.append((TensorInfo(name, shape, cursor.number("<I")), cursor.number("<Q")))
        head = Header(fields, {t.name: t for t, _ in infos}, {}, ALIGNMENT)
        alignment = head.value("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise BadInput(f"`{path}`: alignment {alignment} is no power of two", DAMAGED)
        start = pad(cursor.at, alignment)
        for t, at in infos:
            try:
                end = start + at + t.nbytes
            except (KeyError, ValueError) as error:
                raise BadInput(f"`{path}`: tensor `{t.name}` has unknown type", DAMAGED) from error
            if end > len(data):
                raise BadInput(f"`{path}` ends inside tensor `{t.name}`", DAMAGED)
        return Header(fields, head.tensors, {t.name: start + at for t, at in infos}, alignment)


class _Cursor:
    """A place in a buffer, moved on by what is read; every step is checked against the end."""

    def __init__(self, data: bytes | mmap.mmap, source: str) -> None:
        self.data, self.source, self.at = data, source, 0

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise BadInput(f"`{self.source}` ends inside its header", DAMAGED)
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, n: int, least: int) -> int:
        """n items of at least so many bytes must still fit: a hostile count would run for ever."""
        if n * least > len(self.data) - self.at:
            raise BadInput(f"`{self.source}` announces {n} items, more than it can hold", DAMAGED)
        return n

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", "surrogateescape")

    def kind(self) -> Kind:
        number = self.number("<I")
        if number not in Kind._value2member_map_:
            raise BadInput(f"`{self.source}` has a field of unknown type {number}", DAMAGED)
        return Kind(number)

    def skip(self, kind: Kind) -> None:
        if kind is Kind.STRING:
            self.take(self.number("<Q"))
        elif kind is Kind.ARRAY:
            inner, n = self.kind(), self.number("<Q")
            if inner in _PACK:
                self.take(struct.calcsize(_PACK[inner]) * n)
            else:
                for _ in range(self.count(n, 8)):
                    self.skip(inner)
        else:
            self.take(struct.calcsize(_PACK[kind]))

    def value(self, kind: Kind) -> Any:
        if kind is Kind.STRING:
            return self.text()
        if kind is Kind.ARRAY:
            return list(self._items())
        return self.number(_PACK[kind])

    def _items(self) -> Iterator[Any]:
        inner, n = self.kind(), self.number("<Q")
        for _ in range(self.count(n, 1)):
            yield self.value(inner)
