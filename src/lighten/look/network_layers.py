"""Every weight of a network: what was done to it, its size, what that costs, how it looks.

Weights stand beside each other as they are rounded, that is with the batch norms folded into them;
where nothing is rounded, as they are stored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lighten.coupling import Couplings
from lighten.look.weights import histogram, levels, relative_error
from lighten.macs import Macs, macs, weight_macs
from lighten.network import Network, weighted
from lighten.quantized import Edge, Quantized
from lighten.registry import transforms
from lighten.types import Axis, Compressed, Layer, Plan, Spec
from lighten.walk import tensors_of
from lighten.widths import Curve

MOST_SCORES = 1024
"""Units of an axis up to which the importance of each is kept."""

_BARE = re.compile(r"_channel(_sym)?$")


@dataclass(frozen=True, eq=False)
class Told:
    """What a run has stored of the losses, in nats of KL divergence: axis -> its curve, layer ->
    format -> nats."""

    curves: Mapping[str, Curve] = field(default_factory=dict)
    formats: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def layers(
    original: Network,
    small: Network,
    made: Network | Quantized,
    couplings: Couplings,
    plan: Plan,
    told: Told,
    tick: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """One row a layer, as they are run; see docs/reference/metrics-schema.md for the keys.

    small: at the plan's widths. made: what was exported, small itself where nothing was rounded.
    """
    values = made if isinstance(made, Quantized) else Quantized(made, {}, {})
    folded = values.network is not small
    known = _state(transforms["fold_batchnorm"](original) if folded else original)
    new, weights, limits = _state(values.network), values.weights, ranges(values)
    pruned = _state(small)
    before, after = macs(original), weight_macs(macs(small), small.module.state_dict())
    found = []
    for layer in original.layers:
        row = described(original, layer, before)
        weight, axis = weights.get(layer.name), width_axis(couplings, layer.name)
        dense = new[layer.name] if weight is None else weight.dense().view(new[layer.name].shape)
        size = _bytes(new[layer.name]) if weight is None else weight.nbytes()
        count, units = dense.numel(), None if axis is None else plan.widths.get(axis.name)
        # counted before rounding: few bits leave zeros too, which nobody asked for
        gone = float((pruned[layer.name] == 0).float().mean())
        row |= {
            "parameters_after": count,
            "bytes_after": size,
            "macs_after": after.get(layer.name, 0),
            "format": "f32" if weight is None else short(weight.spec),
            "bits": 8 * size / count,
            "width": _width(output_axes(couplings, layer.name), plan.widths),
            "sparsity": gone if gone > _SPARSE else None,
            "sensitivity": _nats(layer.name, axis, units, weight, told),
            "histogram": histogram(known[layer.name], dense),
            "importance": None if axis is None else importance(told.curves.get(axis.name), units),
        }
        if weight is not None:
            aim = new[layer.name] if folded else known[layer.name]
            row |= {
                "error": relative_error(aim.flatten(1).float(), weight.dense())
                if aim.shape == dense.shape
                else None,
                "error_kind": "weight",
                "grid": levels(weight),
                "range": limits.get(layer.name),
            }
        found.append(row)
        tick()
    return found


_SPARSE = 0.05
"""Share of zeros from which on a weight is called sparse."""


def described(network: Network, layer: Layer, counted: Macs) -> dict[str, Any]:
    """A layer as it came: name, block, kind, shape, counts; macs of one example."""
    weight = network.module.state_dict()[layer.name]
    return {
        "name": layer.name,
        "block": block_of(layer.name),
        "kind": _kind(layer, weight),
        "shape": list(layer.shape),
        "parameters_before": layer.size,
        "bytes_before": _bytes(weight),
        "macs_before": round(layer.size * counted.positions.get(layer.name, 0.0)),
        "rank": None,
    }


def block_of(name: str) -> str | None:
    """The part of a network that a weight is in: to the first numbers in its name that are no
    module of its own, else the module that its own is in.

    >>> [block_of(n) for n in ("layer1.0.conv2.weight", "features.3.conv.0.0.weight")]
    ['layer1.0', 'features.3']
    >>> block_of("features.0.weight"), block_of("conv1.weight")
    ('features', None)
    """
    *path, _ = name.split(".")
    inside = path[:-1]
    numbers = [i for i, part in enumerate(inside) if part.isdigit()]
    if numbers and numbers[0] > 0:
        end = numbers[0]
        while end + 1 in numbers:
            end += 1
        inside = inside[: end + 1]
    return ".".join(inside) or None


def short(spec: Spec) -> str:
    """A format's name without what all formats of networks have: a scale for each output.

    >>> short(Spec("int8_channel_sym")), short(Spec("int4_g32"))
    ('int8', 'int4_g32')
    """
    return _BARE.sub("", spec.format or "f32")


def output_axes(couplings: Couplings, layer: str) -> list[Axis]:
    """The axes that a layer's outputs are of: several where a shortcut reaches a part of them."""
    return [
        axis
        for axis in couplings.axes
        if any(m.parameter == layer and m.role == "writes" for m in axis.members)
    ]


def width_axis(couplings: Couplings, layer: str) -> Axis | None:
    """The axis that a layer's outputs are; one that can be narrowed where they are of several."""
    own = output_axes(couplings, layer)
    return next((axis for axis in own if axis.locked is None), own[0] if own else None)


def importance(curve: Curve | None, kept: int | None) -> dict[str, Any] | None:
    """{"scores", "kept"} by unit: nats that are lost once it, and all that matter less, go."""
    if curve is None or len(curve.order) > MOST_SCORES:
        return None
    width = len(curve.order)
    lost = curve.error[:width].flip(0)  # when so many, from 1 on, are gone
    lost = lost.cummax(0).values
    lost[~lost.isfinite()] = float(lost[lost.isfinite()].max()) if width > 1 else 0.0
    scores = torch.empty(width, dtype=torch.float64)
    scores[curve.order] = lost.double()
    stays = torch.zeros(width, dtype=torch.long)
    stays[curve.kept(width if kept is None else kept)] = 1
    return {"scores": [float(f"{s:.4g}") for s in scores.tolist()], "kept": stays.tolist()}


def ranges(made: Quantized) -> dict[str, dict[str, Any]]:
    """Layer -> the range of what it reads, where that is rounded."""
    found: dict[str, dict[str, Any]] = {}
    for node, name in weighted(made.network.graph):
        edge = _edge(node, made.edges)
        if edge is not None and name not in found:
            found[name] = {
                "low": float(f"{edge.low:.5g}"), "high": float(f"{edge.high:.5g}"),
                "method": "mse", "bits": edge.bits,
            }  # fmt: skip
    return found


def _edge(node: fx.Node, edges: Mapping[str, Edge]) -> Edge | None:
    """Of the tensor that a layer reads, or that what it reads is a view of."""
    source = tensors_of(node)[0]
    while source.name not in edges:
        inputs = tensors_of(source)
        if source.op != "call_function" or len(inputs) != 1:
            return None
        source = inputs[0]
    return edges[source.name]


def _nats(
    name: str, axis: Axis | None, kept: int | None, weight: Compressed | None, told: Told
) -> float | None:
    """What the curves predict of a layer's width, and of its format; None where none is known."""
    parts = []
    curve = None if axis is None else told.curves.get(axis.name)
    if curve is not None and kept is not None and kept < len(curve.order):
        parts.append(float(curve.error[kept]))
    if weight is not None and (nats := told.formats.get(name, {}).get(weight.spec.format or "")):
        parts.append(nats)
    return sum(parts) if parts and all(map(math.isfinite, parts)) else None


def _width(own: Sequence[Axis], widths: Mapping[str, int]) -> dict[str, Any] | None:
    """Of all of a layer's outputs; None where none of them can go."""
    free = [axis for axis in own if axis.locked is None]
    if not free:
        return None
    kept = sum(widths.get(axis.name, axis.width) for axis in own)
    return {"kept": kept, "of": sum(axis.width for axis in own), "axis": free[0].name}


def _kind(layer: Layer, weight: Tensor) -> str:
    if layer.kind != "conv":
        return layer.kind
    return "depthwise" if weight.ndim > 2 and weight.shape[1] == 1 and len(weight) > 1 else "conv"


def _bytes(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()


def _state(network: Network) -> dict[str, Tensor]:
    return network.module.state_dict()
