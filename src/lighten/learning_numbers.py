"""Numbers of a training that cannot be: they are refused before anything is computed."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from lighten.errors import WrongUse


def check_numbers(
    *, rate: Any = None, batch: Any = None, accumulate: Any = None, patience: Any = None,
    average: Any = None, clip: Any = None,
) -> None:  # fmt: skip
    """Raises WrongUse for what is no number or out of range; None stands for what is not asked.

    rate, clip: above 0, finite. batch, accumulate, patience: whole, at least 1 (a patience of 0
    would stop at the first evaluation). average: between 0 and 1, both left out.
    """
    for said, value, hint in (
        ("a rate of", rate, "a number above 0: 0.05 is usual for sgd, 0.001 for adamw"),
        ("to clip gradients at", clip, "a length above 0, such as 5.0"),
    ):
        if value is not None and not (_real(value) and 0 < value < math.inf):
            raise WrongUse(f"{said} {value!r} cannot be", hint)
    for said, value, hint in (
        ("a batch of", batch, "a whole number of examples, at least 1"),
        ("a batch in so many parts:", accumulate, "accumulate is a whole number, at least 1"),
        ("a patience of", patience, "a whole number of evaluations, at least 1"),
    ):
        if value is not None and not (_whole(value) and value >= 1):
            raise WrongUse(f"{said} {value!r} cannot be", hint)
    if average is not None and not (_real(average) and 0 < average < 1):
        raise WrongUse(
            f"an average of {average!r} cannot be", "a decay between 0 and 1, such as 0.999"
        )


def _real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
