"""What the processor does to products of 8 bits, and of bfloat16."""

from __future__ import annotations

from pathlib import Path

INFO = Path("/proc/cpuinfo")


def saturates(info: Path = INFO) -> bool:
    """Whether sums of two u8 * s8 products are cut off at 16 bits: x86 without VNNI.

    Arm has dot products in 32 bits. Where nothing is known (no such file, as on macOS): False.

    *Source:* ONNX Runtime, "Quantize ONNX models", on when and why to reduce the range.
    """
    flags = _flags(info, "flags")  # x86 only: Arm calls them Features
    return bool(flags) and not any("vnni" in flag for flag in flags)


def multiplies_bfloat16(info: Path = INFO) -> bool:
    """Whether there are instructions for products of bfloat16: x86 with AVX-512 BF16 or AMX, Arm
    with BF16. Where nothing is known: False."""
    return bool(_flags(info, "flags", "Features") & {"avx512_bf16", "amx_bf16", "bf16"})


def _flags(info: Path, *fields: str) -> set[str]:
    """What the processor says it can do."""
    if not info.is_file():
        return set()
    flags: set[str] = set()
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in fields:
            flags |= set(value.split())
    return flags
