"""The learning rate at each step: up in a straight line, then down along a cosine to zero.

*Source:* Smith & Topin 2017, "Super-convergence" (one cycle); Loshchilov & Hutter 2017, "SGDR",
equation 5 (cosine).
"""

from __future__ import annotations

import math

WARM_UP = 0.05
"""Share of the steps in which the rate grows."""


def rate_at(step: int, steps: int, rate: float, warm_up: float = WARM_UP) -> float:
    """The rate of step 0 .. steps - 1; `rate` is the highest.

    >>> [round(rate_at(n, 10, 1.0, warm_up=0.2), 2) for n in (0, 1, 2, 5, 9)]
    [0.5, 1.0, 0.97, 0.59, 0.03]
    """
    rising = math.ceil(warm_up * steps)
    if step < rising:
        return rate * (step + 1) / rising
    return rate * (1 + math.cos(math.pi * (step - rising + 1) / (steps - rising + 1))) / 2
