"""What all stages of a run on a language model have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lighten.model import Model
from lighten.run import Run


@dataclass(frozen=True)
class Job:
    """calibration, held_out: windows (count, length) of token ids."""

    run: Run
    model: Model
    exporter: Any
    calibration: Tensor
    held_out: Tensor
    seed: int
