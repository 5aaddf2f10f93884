"""The GGUF layout (version 3, little-endian), written tensor by tensor. `gguf_file` reads it.

    magic | u32 version | u64 tensors | u64 fields
    fields | tensor infos | padding | tensors, each padded

*Source:* ggml's docs/gguf.md; block sizes from the `gguf` package.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from lighten.containers.safetensors import raw_bytes
from lighten.errors import BadOutput

MAGIC = b"GGUF"
ALIGNMENT = 32


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
    raw = text.encode()
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
