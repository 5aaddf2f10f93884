"""How far a compressed network is from the one it came from, both run block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lighten.calibrate import Stream
from lighten.measure import Head, quality
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
) -> dict[str, Any]:
    """The quality (lighten.measure.Quality.as_dict) of `model` with `weights` in place of its own.

    windows: (count, length) token ids, the ones that the reference was made with.
    """
    stream = Stream(model, windows, weights=Dense(weights)).through(tick)
    weight, bias = stream.head
    original = _original_head(model)
    found = quality(
        stream.outputs(),
        _head(model, weight, bias),
        reference.hidden,
        _head(model, original, bias),
        windows,
    )
    return found.as_dict()


def _original_head(model: Model) -> Tensor:
    """The head's weight (vocabulary, width) as it is on disk."""
    for layer in model.layers:
        if layer.kind in ("head", "embedding+head"):
            return model.weight(layer)
    raise LookupError("the model has no head")  # a causal language model always has


def _head(model: Model, weight: Tensor, bias: Tensor | None) -> Head:
    config = model.config
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    divided = getattr(config, "logits_scaling", None) or 1.0
    return Head(weight, bias, softcap, scale / divided)
