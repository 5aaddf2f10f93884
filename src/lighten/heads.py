"""What a network returns: the output that labels are of, and the others beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

LOGITS = ("logits", "out", "last_hidden_state")
"""Where outputs with names have their logits (features, where there are none), in this order."""


def first_of(output: Any) -> Any:
    """A tensor itself, the first of a tuple; by name what LOGITS has, or what is there alone.

    None where that is not to be told.
    """
    if isinstance(output, Mapping):
        named = [output[key] for key in LOGITS if isinstance(output.get(key), Tensor)]
        tensors = [x for x in output.values() if isinstance(x, Tensor)]
        return named[0] if named else tensors[0] if len(tensors) == 1 else None
    if isinstance(output, tuple | list):
        return output[0] if output and isinstance(output[0], Tensor) else None
    return output


def beside(output: Any, first: Tensor) -> list[Tensor]:
    """The other outputs in their order: tensors of floats, as many examples in each as in `first`.

    One number for each example comes as (batch, 1). What is nested deeper is no output: caches,
    and hidden states, where a model returns those too.
    """
    parts = output.values() if isinstance(output, Mapping) else output
    if not isinstance(output, Mapping | tuple | list):
        return []
    found = [
        x
        for x in parts
        if isinstance(x, Tensor) and x is not first and x.is_floating_point() and x.dim() > 0
    ]
    return [x if x.dim() > 1 else x.unsqueeze(1) for x in found if len(x) == len(first)]


def classes_last(x: Tensor) -> Tensor:
    """(batch, ..., classes): outputs of 4 and 5 dimensions have their classes second, as
    segmentation does it, all others last."""
    return x.movedim(1, -1) if x.dim() in (4, 5) else x
