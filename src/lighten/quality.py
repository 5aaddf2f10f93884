"""How far a compressed network is from the one it came from, both run block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lighten.calibrate import Stream
from lighten.divergence import Positions
from lighten.measure import head_of, quality
from lighten.model import Model
from lighten.solve import Dense
from lighten.types import Compressed


@dataclass(frozen=True)
class Reference:
    """What the original's head is given: hidden (windows, length, width) float32."""

    hidden: Tensor


def measure_weights(
    model: Model,
    windows: Tensor,
    weights: Mapping[str, Compressed],
    reference: Reference,
    tick: Callable[[], None] = lambda: None,
    seen: Callable[[Positions], None] = lambda _: None,
) -> dict[str, Any]:
    """The quality (lighten.measure.Quality.as_dict) of `model` with `weights` in place of its own.

    windows: (count, length) token ids, the ones that the reference was made with. seen: is given
    what is known of each position, window by window.
    """
    stream = Stream(model, windows, weights=Dense(weights)).through(tick)
    weight, bias = stream.head
    original = _original_head(model)
    found = quality(
        stream.outputs(),
        head_of(model, weight, bias),
        reference.hidden,
        head_of(model, original, bias),
        windows,
        seen=seen,
    )
    return found.as_dict()


def _original_head(model: Model) -> Tensor:
    """The head's weight (vocabulary, width) as it is on disk."""
    for layer in model.layers:
        if layer.kind in ("head", "embedding+head"):
            return model.weight(layer)
    raise LookupError("the model has no head")  # a causal language model always has
