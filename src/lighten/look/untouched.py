"""A model that nothing was done to, as it is looked at: its layers, and what could be done.

What a layer would lose is a preview: rounding to 4 bits, by the weights alone; and of networks,
with data, the nats that half of the channels it writes are worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lighten import network_cost
from lighten.coupling import Couplings
from lighten.look.language_layers import described as described_text
from lighten.look.network_curve import MOST_NATS, other_budgets
from lighten.look.network_layers import described, importance, width_axis
from lighten.look.weights import histogram, relative_error, sampled
from lighten.macs import macs
from lighten.model import Model
from lighten.network import Network
from lighten.registry import exporters, formats
from lighten.structure import free
from lighten.types import Layer, Spec
from lighten.widths import Curve

FOUR_BITS = ("q4_k", "q4_0", "int4_g32", "int4_channel_sym")
"""Formats that stand for 4 bits: the first that a language model's layer fits."""

PREVIEW = "weight4"
"""The error_kind of what rounding to 4 bits would do."""

_UNSEEN = {"width": None, "sparsity": None, "grid": None, "range": None, "error_kind": PREVIEW}


def network_layers(
    network: Network,
    couplings: Couplings,
    curves: Mapping[str, Curve],
    tick: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Rows as lighten.look.network_layers gives them. curves: of the axes, where there are any."""
    counted, state = macs(network), network.module.state_dict()
    found = []
    for layer in network.layers:
        row = described(network, layer, counted) | _UNSEEN
        axis, weight = width_axis(couplings, layer.name), state[layer.name]
        curve = None if axis is None else curves.get(axis.name)
        half = math.nan if curve is None else float(curve.error[max(1, len(curve.order) // 2)])
        row |= {
            "bits": 8.0 * weight.element_size(),
            "sensitivity": half if math.isfinite(half) else None,
            "error": rounded_to_four(weight.flatten(1).float(), FOUR_BITS[-1:]),
            "histogram": histogram(weight, None),
            "importance": importance(curve, None),
        }
        found.append(row)
        tick()
    return found


def text_layers(model: Model, tick: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """Rows as lighten.look.language_layers gives them; of large layers a sample of rows."""
    found = []
    for layer in model.layers:
        row = described_text(model, layer) | _UNSEEN
        rows, weight = sampled(*layer.shape), model.weight(layer)
        seen = (weight if rows is None else weight[rows]).float()
        row |= {
            "bits": 8 * row["bytes_before"] / layer.size,
            "sensitivity": None,
            "error": rounded_to_four(seen, FOUR_BITS),
            "histogram": histogram(seen, None),
            "rows_seen": len(seen),
        }
        found.append(row)
        tick()
    return found


def rounded_to_four(weight: Tensor, names: Sequence[str]) -> float | None:
    """Relative error of a weight (out, in) rounded to nearest in the first format that fits it."""
    shape = (int(weight.shape[0]), int(weight.shape[1]))
    for name in names:
        format = formats[name]
        if format.accepts(shape):
            continue
        grid = format.fit(weight)
        return relative_error(weight, format.decode(format.encode(weight, grid), grid))
    return None


def network_budgets(
    network: Network, couplings: Couplings, curves: Mapping[str, Curve]
) -> list[dict[str, Any]]:
    """Points of the trade-off curve that no run has measured: the original and what widths give."""
    counted = round(macs(network).total)
    points: list[dict[str, Any]] = [
        {"plan": "original", "source": "original", "measured": True, "bytes": network.nbytes,
         "macs": counted, "parameters": network.parameters, "mean_kld": 0.0}
    ]  # fmt: skip
    each = network.nbytes / max(1, network.parameters)
    for row in other_budgets(network, free(couplings.axes, curves), curves):
        if row["predicted_kld"] <= MOST_NATS:
            size = round(each * row["parameters"])
            points.append(
                {**row, "measured": False, "bytes": size, "mean_kld": row["predicted_kld"]}
            )
    return points


def least_of_text(model: Model) -> tuple[int, str]:
    """Bytes of the smallest .gguf, each layer in the smallest format that fits, and the format that
    most weights have there. Of a model that has no GGUF, by the bits of all formats."""
    exporter = exporters["gguf"]
    able = exporter.refuses(model) is None
    specs: dict[str, Spec] = {}
    size = 0.0
    for layer in model.layers:
        spec, bytes_ = min(_options(model, layer, able), key=lambda option: option[1])
        specs[layer.name] = spec
        size += bytes_
    names = [spec.format or "keep" for spec in specs.values()]
    most = max(sorted(set(names)), key=names.count) if names else "keep"
    if able:
        return int(exporter.nbytes(model, specs)), most
    layers = {layer.name for layer in model.layers}
    rest = sum(t.nbytes for name, t in model.tensors.items() if name not in layers)
    return int(size) + rest, most


def _options(model: Model, layer: Layer, able: bool) -> list[tuple[Spec, float]]:
    """Formats that a layer fits and its bytes in them, as it is among them."""
    exporter, found = exporters["gguf"], [(Spec(), float(model.tensors[layer.name].nbytes))]
    for name, format in formats.items():
        spec = Spec(name)
        why = exporter.accepts(spec, layer, model) if able else None
        if why is None and format.accepts(layer.shape) is None:
            found.append((spec, format.bits(layer.shape[1]) * layer.size / 8))
    return found


def now_of(network: Network) -> dict[str, Any]:
    """What a network is now, in the quantities of metrics.json."""
    return {"bytes": network.nbytes, **network_cost.sizes(network)}
