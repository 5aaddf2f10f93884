"""Bytes of the K types and IQ4_XS: codes and integer scales of a super-block of 256, both ways.

Every function takes and gives uint8 tensors whose first dimension is super-blocks; codes and
scales are offset binary (0 is the least level). *Source:* llama.cpp, ggml-common.h (block_q2_K ...
block_q6_K, block_iq4_xs) and the dequantize_row_ functions of ggml-quants.c.
"""

from __future__ import annotations

import torch
from torch import Tensor


def planes(codes: Tensor, bits: int, lane: int) -> Tensor:
    """(b, n) codes -> (b, n * bits / 8): bit fields of `lane` neighbours share `lane` bytes."""
    per = 8 // bits
    c = codes.view(codes.shape[0], -1, per, lane)
    out = c[:, :, 0].clone()
    for i in range(1, per):
        out |= c[:, :, i] << (bits * i)
    return out.view(codes.shape[0], -1)


def unplanes(stored: Tensor, bits: int, lane: int) -> Tensor:
    """The inverse of planes."""
    c = stored.reshape(stored.shape[0], -1, 1, lane)
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=stored.device).view(1, 1, -1, 1)
    return ((c >> shift) & ((1 << bits) - 1)).view(stored.shape[0], -1)


def six_bit_pairs(scale: Tensor, minimum: Tensor) -> Tensor:
    """8 scales and 8 mins of 6 bits (b, 8) each -> (b, 12), as Q4_K and Q5_K store them."""
    a, b = scale[:, :4], scale[:, 4:]
    c, d = minimum[:, :4], minimum[:, 4:]
    return torch.cat([a | (b >> 4) << 6, c | (d >> 4) << 6, (b & 15) | (d & 15) << 4], 1)


def un_six_bit_pairs(stored: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of six_bit_pairs."""
    a, c, low = stored[:, :4], stored[:, 4:8], stored[:, 8:]
    scale = torch.cat([a & 63, (low & 15) | (a >> 6) << 4], 1)
    minimum = torch.cat([c & 63, (low >> 4) | (c >> 6) << 4], 1)
    return scale, minimum


def six_bit_q3(scale: Tensor) -> Tensor:
    """16 scales of 6 bits (b, 16), offset 32 -> (b, 12), as Q3_K stores them."""
    return torch.cat([planes(scale & 15, 4, 8), planes(scale >> 4, 2, 4)], 1)


def un_six_bit_q3(stored: Tensor) -> Tensor:
    """The inverse of six_bit_q3."""
    return unplanes(stored[:, :8], 4, 8) | unplanes(stored[:, 8:], 2, 4) << 4


def six_bit_iq4_xs(scale: Tensor) -> Tensor:
    """8 scales of 6 bits (b, 8), offset 32 -> (b, 6): high bits (a uint16), then low nibbles."""
    return torch.cat([planes(scale >> 4, 2, 1), planes(scale & 15, 4, 1)], 1)


def un_six_bit_iq4_xs(stored: Tensor) -> Tensor:
    """The inverse of six_bit_iq4_xs."""
    return unplanes(stored[:, 2:], 4, 1) | unplanes(stored[:, :2], 2, 1) << 4


def halves(*values: Tensor) -> Tensor:
    """float16 numbers (b,) side by side as bytes (b, 2 * len(values))."""
    return torch.stack([v.half() for v in values], 1).view(torch.uint8)


def un_halves(stored: Tensor) -> list[Tensor]:
    """The inverse of halves, in float32."""
    return list(stored.contiguous().view(torch.float16).float().unbind(1))
