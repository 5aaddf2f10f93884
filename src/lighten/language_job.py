"""What all stages of a run on a language model have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lighten.data import Corpus, windows
from lighten.errors import WrongUse
from lighten.model import Model
from lighten.run import Run

HELD_OUT_WINDOWS = 16
"""Windows that a result is measured on."""


@dataclass(frozen=True)
class Job:
    """calibration, held_out: windows (count, length) of token ids."""

    run: Run
    model: Model
    exporter: Any
    calibration: Tensor
    held_out: Tensor
    seed: int


def job_of(
    run: Run, model: Model, corpus: Corpus, exporter: Any, samples: int, length: int, seed: int
) -> Job:
    """Tokens: the first `samples` windows to calibrate on, the ones after them to measure on."""
    ids = windows(corpus, model.tokenizer, length, samples + HELD_OUT_WINDOWS, seed=seed)
    whole = len(ids) == samples + HELD_OUT_WINDOWS
    held_out = HELD_OUT_WINDOWS if whole else min(HELD_OUT_WINDOWS, max(1, len(ids) // 4))
    if len(ids) < 2:
        raise WrongUse(
            f"{corpus.source} gives {len(ids)} window of {length} tokens",
            "two are needed, one of them to measure on: give more text or a smaller --length",
        )
    return Job(run, model, exporter, ids[:-held_out][:samples], ids[-held_out:], seed)
