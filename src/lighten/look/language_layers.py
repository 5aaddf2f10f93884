"""Every weight of a language model: what was done to it, its bytes, what that costs, how it looks.

One layer is in memory at a time, and of a large one only a sample of its rows decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lighten.look.weights import histogram, levels, relative_error, sampled
from lighten.model import Model
from lighten.types import Candidate, Compressed, Layer, Spec


def layers(
    model: Model,
    exporter: Any,
    specs: Mapping[str, str],
    weights: Mapping[str, Compressed],
    candidates: Sequence[Candidate],
    tick: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """One row a layer, in order; see docs/reference/metrics-schema.md for the keys.

    weights: those that specs give a format. candidates: stored ones, for the predicted nats.
    """
    nats = {(c.unit, spec): c.error for c in candidates for spec in c.specs.values()}
    found = []
    for layer in model.layers:
        spec = Spec.parse(specs.get(layer.name, "keep"))
        row = described(model, layer)
        size = exporter.layer_bytes(model, layer, spec)
        row |= {
            "parameters_after": layer.size,
            "bytes_after": size,
            "macs_after": row["macs_before"],
            "format": spec.format or "keep",
            "bits": 8 * size / layer.size,
            "sparsity": None,
            "sensitivity": nats.get((layer.name, str(spec))),
        }
        found.append(row | _seen(model, layer, weights.get(layer.name)))
        tick()
    return found


def described(model: Model, layer: Layer) -> dict[str, Any]:
    """A layer as it came: name, block, kind, shape, counts; macs of one token."""
    multiplies = layer.kind not in ("embedding", "positions")
    return {
        "name": layer.name,
        "block": layer.block,
        "kind": layer.kind,
        "shape": list(layer.shape),
        "parameters_before": layer.size,
        "bytes_before": model.tensors[layer.name].nbytes,
        "macs_before": layer.size if multiplies else 0,
        "width": None,
        "rank": None,
        "importance": None,
        "range": None,
    }


def _seen(model: Model, layer: Layer, weight: Compressed | None) -> dict[str, Any]:
    """Histogram, error and grid."""
    rows = sampled(*layer.shape)
    before = _taken(model.weight(layer), rows)
    if weight is None:
        return {"error": None, "histogram": histogram(before, None), "grid": None,
                "rows_seen": len(before)}  # fmt: skip
    after = (weight if rows is None else weight.rows(rows)).dense().to(before)
    return {
        "error": relative_error(before, after),
        "error_kind": "weight",
        "histogram": histogram(before, after),
        "grid": levels(weight),
        "rows_seen": len(before),
    }


def _taken(weight: Tensor, rows: Tensor | None) -> Tensor:
    return weight if rows is None else weight[rows]
