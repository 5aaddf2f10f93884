"""How many bits a word for a precision means, and what a budget suggests."""

from __future__ import annotations

import re

from lighten.errors import WrongUse
from lighten.registry import formats
from lighten.types import Budget

Bits = tuple[int, int | None]
"""Of weights and of activations, None: these stay float."""

PRECISIONS: dict[str, Bits | None] = {
    "none": None, "int8": (8, 8), "w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4), "w8": (8, None),
    "w4": (4, None),
}  # fmt: skip
"""What `quantize` may be -> bits of weights and of activations."""

_FORMATS_COST = ("bytes", "share", "ms")
"""Units of budgets that the format of a layer counts in."""

GROUP = 32
"""Inputs of a linear weight that share a scale where activations stay float."""


def precision(quantize: str, limit: Budget | None) -> Bits | None:
    """(bits of weights, of activations), None for float; "auto" integers for bytes and time alone.

    Raises WrongUse for an unknown word.
    """
    if quantize == "auto":
        return (8, 8) if limit is None or limit.unit in _FORMATS_COST else None
    if quantize == "mixed":
        if limit is None or limit.unit not in _FORMATS_COST:
            raise WrongUse(
                "quantize `mixed` needs a budget that the format of a layer counts in",
                'such as --budget 25%, 300kB or "50% ms"',
            )
        return 8, 8
    if quantize not in PRECISIONS:
        raise WrongUse(f"quantize is `{quantize}`", f"known: auto, mixed, {', '.join(PRECISIONS)}")
    return PRECISIONS[quantize]


def mixes(quantize: str, limit: Budget | None) -> bool:
    """Whether every layer gets a format of its own: where that was asked for, and in "auto" where
    the format counts in the budget."""
    counts = limit is not None and limit.unit in _FORMATS_COST
    return quantize == "mixed" or (quantize == "auto" and counts)


def group_of(bits: Bits) -> int | None:
    """Inputs of a linear weight that share a scale; None: the whole row does."""
    return GROUP if bits[1] is None else None


def named(format: str) -> tuple[int, int | None, int]:
    """(bits of weights, of activations, group) that a format's name stands for, weights alone.

    >>> named("int4_g32")
    (4, None, 32)
    """
    found = re.fullmatch(r"int(\d+)_g(\d+)", format)
    if found is None or format not in formats:
        raise WrongUse(
            f"weights of a network cannot be `{format}`",
            "bits per channel, 8 or 4, or a format in groups: int4_g32, int8_g128",
        )
    return int(found[1]), None, int(found[2])
