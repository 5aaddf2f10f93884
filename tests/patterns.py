"""Tiny networks, one for each way in which channels depend on each other.

Each is a function that returns (module, example inputs); PATTERNS has them by name with the axes
that can shrink and their widths, in the order of the imports. Each kind has a module of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pattern_parts import PATTERNS, Made, Pattern, Run, conv, image, lively, pattern  # noqa: F401
from patterns_layers import *  # noqa: F403
from patterns_operators import *  # noqa: F403
from patterns_sequences import *  # noqa: F403


@pattern({"b.weight": 6})
def unknown_operator() -> Made:
    """What an operator without a rule touches is locked; the rest is not."""

    def forward(m: Run, x: Tensor) -> Tensor:
        x = torch.sort(m.a(x), dim=1).values
        return m.c(F.relu(m.b(x)))

    return Run(forward, a=conv(3, 8), b=conv(8, 6), c=conv(6, 3)), image()
