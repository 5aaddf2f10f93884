"""How many bits a word for a precision means, and what a budget suggests."""

from __future__ import annotations

from lighten.errors import WrongUse
from lighten.types import Budget

PRECISIONS = {"none": None, "int8": (8, 8), "w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4)}
"""What `quantize` may be -> bits of weights and of activations."""


def precision(quantize: str, limit: Budget | None) -> tuple[int, int] | None:
    """(bits of weights, of activations), None for float; "auto" integers for bytes and time alone.

    Raises WrongUse for an unknown word.
    """
    if quantize == "auto":
        small = limit is None or limit.unit in ("bytes", "share", "ms")
        return (8, 8) if small else None
    if quantize not in PRECISIONS:
        raise WrongUse(f"quantize is `{quantize}`", f"known: auto, {', '.join(PRECISIONS)}")
    return PRECISIONS[quantize]
