"""What the processor does to products of 8 bits."""

from __future__ import annotations

from pathlib import Path

INFO = Path("/proc/cpuinfo")


def saturates(info: Path = INFO) -> bool:
    """Whether sums of two u8 * s8 products are cut off at 16 bits: x86 without VNNI.

    Arm has dot products in 32 bits. Where nothing is known (no such file, as on macOS): False.

    *Source:* ONNX Runtime, "Quantize ONNX models", on when and why to reduce the range.
    """
    if not info.is_file():
        return False
    flags: set[str] = set()
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":  # x86 only: Arm calls them Features
            flags |= set(value.split())
    return bool(flags) and not any("vnni" in flag for flag in flags)
