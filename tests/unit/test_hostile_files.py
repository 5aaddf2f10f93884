"""Damaged and hostile safetensors and GGUF files: refused with a hint, never a crash."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lighten.errors import BadInput
from lighten.gguf_file import read_gguf
from lighten.tensors import safetensors_file, safetensors_folder

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}


def packed(header: Any, data: bytes = b"\0" * 34) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(begin: Any, end: Any, shape: Any = (6,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_safetensors_are_read_as_the_library_writes_them(tmp_path: Path) -> None:
    extra = {
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "half": torch.randn(3, 2).half(),
        "int": torch.arange(7),
        "flags": torch.tensor([True, False]),
        "fp8": torch.ones(4).to(torch.float8_e4m3fn),
    }
    (tmp_path / "m").write_bytes(save(TENSORS | extra, metadata={"format": "pt"}))
    read = safetensors_file(tmp_path / "m")
    for name, tensor in (TENSORS | extra).items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tuple(tensor.shape)
        assert torch.equal(read[name].load().float(), tensor.float())
        assert read[name].nbytes == tensor.numel() * tensor.element_size()
    assert torch.equal(read["a"].rows(1, 9), TENSORS["a"][1:])
    assert read["a"].rows(2, 2).shape == (0, 3)


HOSTILE = {
    "empty": b"",
    "seven bytes": b"\1" * 7,
    "header beyond the file": struct.pack("<Q", 10**6) + b"{}",
    "header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "not JSON": packed(b"{'a'"),
    "not UTF-8": packed(b'{"\xff\xfe": 1}'),
    "deep JSON": packed(b"[" * 50_000),
    "a list": packed([]),
    "a name twice": packed(b'{"a": 1, "a": 2}'),
    "no entry": packed({"a": 1}),
    "no shape": packed({"a": {"dtype": "F32", "data_offsets": [0, 24]}}, b"\0" * 24),
    "three offsets": packed({"a": {**entry(0, 24), "data_offsets": [0, 24, 24]}}, b"\0" * 24),
    "unknown type": packed({"a": entry(0, 24, dtype="F31")}, b"\0" * 24),
    "type is a list": packed({"a": entry(0, 24, dtype=["F32"])}, b"\0" * 24),
    "negative offset": packed({"a": entry(-24, 0)}, b"\0" * 24),
    "backwards": packed({"a": entry(24, 0)}, b"\0" * 24),
    "negative size": packed({"a": entry(0, 24, (-2, -3))}, b"\0" * 24),
    "huge size": packed({"a": entry(0, 24, (2**40, 2**40))}, b"\0" * 24),
    "size is a float": packed({"a": entry(0, 24, (6.0,))}, b"\0" * 24),
    "size is true": packed({"a": entry(0, 4, (True,))}, b"\0" * 4),
    "size of a string": packed({"a": {**entry(0, 24), "shape": "6"}}, b"\0" * 24),
    "wrong bytes": packed({"a": entry(0, 20)}, b"\0" * 24),
    "overlap": packed({"a": entry(0, 24), "b": entry(12, 36)}, b"\0" * 36),
    "same place": packed({"a": entry(0, 24), "b": entry(0, 24)}, b"\0" * 24),
    "hole": packed({"a": entry(0, 24), "b": entry(28, 52)}, b"\0" * 52),
    "beyond the file": packed({"a": entry(0, 24)}, b"\0" * 20),
    "bytes left over": packed({"a": entry(0, 24)}, b"\0" * 30),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_safetensors_are_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "m").write_bytes(HOSTILE[case])
    with pytest.raises(BadInput) as caught:
        safetensors_file(tmp_path / "m")
    assert caught.value.hint


def test_safetensors_cut_anywhere_are_refused(tmp_path: Path) -> None:
    whole = save(TENSORS)
    for length in range(len(whole)):
        (tmp_path / "m").write_bytes(whole[:length])
        with pytest.raises(BadInput):
            safetensors_file(tmp_path / "m")


def test_a_file_that_shrinks_after_opening_is_refused(tmp_path: Path) -> None:
    whole = save(TENSORS)
    (tmp_path / "m").write_bytes(whole)
    tensors = safetensors_file(tmp_path / "m")
    (tmp_path / "m").write_bytes(whole[:-20])
    with pytest.raises(BadInput, match="truncated or changed"):
        [t.load() for t in tensors.values()]
    (tmp_path / "m").unlink()
    with pytest.raises(BadInput, match="cannot read"):
        tensors["a"].load()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.integers(0, 3))
def test_one_wrong_byte_never_crashes_safetensors(
    tmp_path: Path, at: int, byte: int, cut: int
) -> None:
    raw = bytearray(save(TENSORS))
    raw[at % len(raw)] = byte
    (tmp_path / "m").write_bytes(bytes(raw[: len(raw) - cut]))
    try:
        for tensor in safetensors_file(tmp_path / "m").values():
            tensor.load()
    except BadInput:
        pass


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("not json", "damaged"),
        ({}, "damaged"),
        ({"weight_map": ["a"]}, "damaged"),
        ({"weight_map": {"a": "../m.safetensors"}}, "beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "beside it"),
        ({"weight_map": {"a": 3}}, "beside it"),
        ({"weight_map": {"a": "2.safetensors"}}, "is not there"),
        ({"weight_map": {"a": "1.safetensors"}}, "does not place"),
        (
            {"weight_map": {"a": "1.safetensors", "b": "1.safetensors", "c": "1.safetensors"}},
            "`c` where it is not",
        ),
    ],
)
def test_hostile_indices_are_refused(tmp_path: Path, index: Any, said: str) -> None:
    (tmp_path / "1.safetensors").write_bytes(save(TENSORS))
    text = index if isinstance(index, str) else json.dumps(index)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BadInput, match=said):
        safetensors_folder(tmp_path)


# --- GGUF -----------------------------------------------------------------------------------


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


ARCH = pair(b"general.architecture", 8, string(b"llama"))


def info(name: bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(dims)}Q", *dims)
    return string(name) + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", kind, offset)


def gguf_bytes(
    pairs: tuple[bytes, ...] = (ARCH,),
    infos: tuple[bytes, ...] = (),
    data: int = 0,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    n_tensors, n_pairs = counts or (len(infos), len(pairs))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_pairs)
    head += b"".join(pairs) + b"".join(infos)
    return head + b"\0" * (-len(head) % 32) + b"\0" * data


def test_gguf_is_read_as_the_package_writes_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint32("u", 7)
    writer.add_float32("f", 0.5)
    writer.add_bool("yes", True)
    writer.add_int64("long", -5)
    writer.add_array("names", ["a", "", "日本"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("flags", [True, False])
    w = rng.standard_normal((4, 512)).astype(np.float32)
    writer.add_tensor("plain", w)
    writer.add_tensor("cube", w.reshape(2, 4, 256).astype(np.float16))
    kinds = [
        gguf.GGMLQuantizationType[k]
        for k in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "TQ1_0", "TQ2_0")
    ]
    for kind in kinds:
        writer.add_tensor(kind.name, gguf.quants.quantize(w, kind), raw_dtype=kind)
    random = {}
    for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ3_S"):
        number = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[number]
        random[kind] = rng.integers(0, 60, (4, 512 // block * size), dtype=np.uint8)
        writer.add_tensor(kind, random[kind], raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "m.gguf")
    assert file.architecture == "llama"
    wanted = {"u": 7, "f": 0.5, "yes": True, "long": -5, "names": ["a", "", "日本"]}
    wanted |= {"numbers": [1, -2, 3], "flags": [True, False]}
    assert {k: file.metadata[k] for k in wanted} == wanted
    assert file.types["u"] == (gguf.GGUFValueType.UINT32, None)
    assert file.types["names"] == (gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING)
    assert torch.equal(file.tensors["plain"].load(), torch.from_numpy(w))
    assert torch.equal(file.tensors["cube"].rows(1, 2), file.tensors["cube"].load()[1:2])
    assert file.tensors["cube"].shape == (2, 4, 256)
    assert file.tensors["BF16"].dtype == torch.bfloat16
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        got = file.tensors[tensor.name].load().float().numpy()
        assert np.array_equal(got, expected.astype(np.float32).reshape(got.shape), equal_nan=True)
        again = file.tensors[tensor.name].rows(1, 3).float().numpy()
        assert np.array_equal(again, got[1:3], equal_nan=True)


def test_types_that_cannot_be_dequantised_are_named(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.IQ1_M
    missing = kind not in gguf.quants._type_traits
    kind = kind if missing else gguf.GGMLQuantizationType.Q8_1
    _, size = gguf.GGML_QUANT_SIZES[kind]
    raw = gguf_bytes(infos=(info(b"w", (256, 1), int(kind)),), data=8 * size)
    (tmp_path / "m").write_bytes(raw)
    if kind in gguf.quants._type_traits:
        pytest.skip("this gguf package reads every type")
    with pytest.raises(BadInput, match=f"`w`.*{kind.name}"):
        read_gguf(tmp_path / "m").tensors["w"].load()


F32_ROW = info(b"w", (8,))
BAD_GGUF = {
    "empty": b"",
    "wrong magic": gguf_bytes(magic=b"GGUX"),
    "version 1": gguf_bytes(version=1),
    "big-endian": gguf_bytes(version=3 << 24),
    "huge tensor count": gguf_bytes(counts=(2**60, 1)),
    "huge key count": gguf_bytes(counts=(0, 2**60)),
    "one key too many": gguf_bytes(counts=(0, 2)),
    "no architecture": gguf_bytes(pairs=()),
    "architecture is a number": gguf_bytes((pair(b"general.architecture", 4, b"\1\0\0\0"),)),
    "key beyond the file": gguf_bytes((struct.pack("<Q", 2**62) + b"x",)),
    "string beyond the file": gguf_bytes((ARCH, pair(b"k", 8, struct.pack("<Q", 10**12)))),
    "key is not UTF-8": gguf_bytes((ARCH, pair(b"\xff", 4, b"\0" * 4))),
    "value is not UTF-8": gguf_bytes((ARCH, pair(b"k", 8, string(b"\xc3\x28")))),
    "unknown value type": gguf_bytes((ARCH, pair(b"k", 13, b"\0" * 8))),
    "array of arrays": gguf_bytes((ARCH, pair(b"k", 9, struct.pack("<IQ", 9, 1)))),
    "huge array": gguf_bytes((ARCH, pair(b"k", 9, struct.pack("<IQ", 4, 2**61)))),
    "huge array of strings": gguf_bytes((ARCH, pair(b"k", 9, struct.pack("<IQ", 8, 2**61)))),
    "key twice": gguf_bytes((ARCH, ARCH)),
    "alignment 0": gguf_bytes((ARCH, pair(b"general.alignment", 4, struct.pack("<I", 0)))),
    "alignment 48": gguf_bytes((ARCH, pair(b"general.alignment", 4, struct.pack("<I", 48)))),
    "alignment true": gguf_bytes((ARCH, pair(b"general.alignment", 7, b"\1"))),
    "tensor twice": gguf_bytes(infos=(F32_ROW, info(b"w", (8,), offset=32)), data=64),
    "nameless tensor": gguf_bytes(infos=(info(b"", (8,)),), data=32),
    "long name": gguf_bytes(infos=(info(b"w" * 64, (8,)),), data=32),
    "no dimensions": gguf_bytes(infos=(info(b"w", ()),), data=32),
    "five dimensions": gguf_bytes(infos=(info(b"w", (1,) * 5),), data=32),
    "dimension 0": gguf_bytes(infos=(info(b"w", (8, 0)),), data=32),
    "dimensions overflow": gguf_bytes(infos=(info(b"w", (2**33, 2**33)),), data=32),
    "dimension 2**64-1": gguf_bytes(infos=(info(b"w", (2**64 - 1,)),), data=32),
    "unknown tensor type": gguf_bytes(infos=(info(b"w", (8,), 999),), data=32),
    "row is no block": gguf_bytes(infos=(info(b"w", (40,), 2),), data=64),
    "offset not aligned": gguf_bytes(infos=(info(b"w", (8,), offset=4),), data=64),
    "offset beyond the file": gguf_bytes(infos=(info(b"w", (8,), offset=2**40),), data=64),
    "negative offset": gguf_bytes(infos=(info(b"w", (8,), offset=2**64 - 32),), data=64),
    "data cut off": gguf_bytes(infos=(F32_ROW,), data=31),
    "overlap": gguf_bytes(infos=(info(b"v", (16,)), info(b"w", (8,), offset=32)), data=64),
    "same place": gguf_bytes(infos=(info(b"v", (8,)), F32_ROW), data=64),
}


@pytest.mark.parametrize("case", BAD_GGUF)
def test_hostile_gguf_is_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "m.gguf").write_bytes(BAD_GGUF[case])
    with pytest.raises(BadInput) as caught:
        read_gguf(tmp_path / "m.gguf")
    assert caught.value.hint


GOOD = gguf_bytes(
    (
        ARCH,
        pair(b"list", 9, struct.pack("<IQ", 8, 2) + string(b"one") + string(b"two")),
        pair(b"numbers", 9, struct.pack("<IQ", 6, 3) + b"\0" * 12),
        pair(b"flag", 7, b"\1"),
    ),
    (info(b"v", (32, 2), 2), info(b"w", (8,), offset=64)),
    96,
)


def test_gguf_cut_anywhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(GOOD)
    assert set(read_gguf(tmp_path / "m").tensors) == {"v", "w"}
    for length in range(len(GOOD)):
        (tmp_path / "m").write_bytes(GOOD[:length])
        with pytest.raises(BadInput):
            read_gguf(tmp_path / "m")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(GOOD) - 1), raw=st.binary(min_size=1, max_size=8))
def test_wrong_bytes_never_crash_gguf(tmp_path: Path, at: int, raw: bytes) -> None:
    (tmp_path / "m").write_bytes((GOOD[:at] + raw + GOOD[at + len(raw) :])[: len(GOOD)])
    try:
        for tensor in read_gguf(tmp_path / "m").tensors.values():
            tensor.load()
    except BadInput:
        pass
