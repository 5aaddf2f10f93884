"""A training whose loss or evaluation is not finite: what is told, and what to do next."""

from __future__ import annotations

from pathlib import Path

from lighten.errors import BadInput, BadOutput
from lighten.optimizers import RATE


class BrokeDown(BadOutput):
    """Not finite after a network that came in sound has learned: what follows would be NaN."""


def lower_rate(rate: float) -> str:
    """What to try instead: a third, but no more than any optimizer usually takes.

    >>> lower_rate(0.06), lower_rate(1e12)
    ('0.02', '0.05')
    """
    return f"{min(rate / 3, max(RATE.values())):.2g}"


def broke_down(
    why: str, step: int, steps: int, rate: float, best_step: int, folder: Path | None
) -> Exception:
    """The error of a training at `step` of `steps`; before the first update a BadInput, for no rate
    is to blame then.

    best_step: of the best state, 0 where that is the one given. folder: of checkpoints.
    """
    if step == 0:
        return BadInput(
            f"before anything was learned: {why}",
            "what came in is at fault, not the rate: look for NaN and huge values in the data, in"
            " the network's weights, or in what it is judged and taught by",
        )
    lower = f"a lower rate (it was {rate:g}, try {lower_rate(rate)})"
    if folder is None:
        hint = f"{lower}; with a folder the best state before is kept there"
    else:
        best = folder / f"best-{best_step}.safetensors"
        kept = f"is {best}" if best_step else "is the one that was given"
        hint = (
            f"{lower} and another --out or folder: this one goes on with the same request alone."
            f" The best state before {kept}"
        )
    return BrokeDown(f"learning broke down at step {step} of {steps}: {why}", hint)
