"""What a network is made of: which channels can go, what they tie and save, where its MACs are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lighten.coupling import Couplings, couple
from lighten.macs import Macs, macs, weight_macs
from lighten.network import Network
from lighten.types import Axis

_SHOWN = 2  # tied weights named in the table; all are in the JSON

Shapes = Mapping[str, torch.Size]


def inspect_network(network: Network, couplings: Couplings | None = None) -> dict[str, Any]:
    """Facts about a network that `summary.show` prints; raises BadInput where it cannot be traced.

    axes: one row each: its units, what one of them ties together, what the first that goes saves in
    MACs and parameters, the share of all MACs that all of them touch, why none can go. layers:
    every weight. MACs are those of one example; smallest_*: what is left with one unit on every
    axis that can shrink. couplings: of the network, where they are known.
    """
    couplings = couple(network) if couplings is None else couplings
    counted = macs(network)
    shapes = {name: p.shape for name, p in network.module.named_parameters()}
    rows = [axis_row(axis, counted, shapes) for axis in couplings.axes]
    return {
        "network": network.source,
        "module": type(network.module).__name__,
        "inputs": ", ".join("x".join(map(str, x.shape[1:])) for x in network.inputs),
        "parameters": network.parameters,
        "bytes": network.nbytes,
        "macs": counted.total,
        **_smallest(couplings, counted, shapes),
        "axes_that_can_shrink": len(couplings.free),
        "axes": sorted(rows, key=lambda row: bool(row["locked"])),
        "layers": _layers(network, counted),
        "notes": _notes(network, couplings, counted),
    }


def axis_row(axis: Axis, counted: Macs, shapes: Shapes) -> dict[str, Any]:
    """A row: what one unit is and what it saves while all else is whole."""
    tied: dict[str, str] = {}
    for member in axis.members:
        role = f"{member.role} along {member.dim}"
        tied[member.parameter] = ", ".join(filter(None, (tied.get(member.parameter), role)))
    one, whole = _gone(axis, shapes, 1), _gone(axis, shapes, axis.width)
    saved, all_ = (
        sum(n * counted.positions.get(name, 0.0) for name, n in gone.items())
        for gone in (one, whole)
    )
    return {
        "axis": axis.name,
        "kind": axis.kind,
        "units": axis.width,
        "ties": _ties(axis),
        "macs_per_unit": round(saved),
        "parameters_per_unit": round(sum(one.values())),
        "macs_share": all_ / counted.total if counted.total else 0.0,
        "locked": axis.locked or "",
        "tied": tied,
    }


def _gone(axis: Axis, shapes: Shapes, units: int) -> dict[str, float]:
    """Parameter -> numbers that go with so many units while all other axes are whole."""
    left: dict[str, float] = {}
    for member in axis.members:
        if member.parameter in shapes:
            share = units * member.index.shape[1] / shapes[member.parameter][member.dim]
            # A weight whose rows and columns are both of the axis loses a cross, not two stripes.
            left[member.parameter] = left.get(member.parameter, 1.0) * (1 - share)
    return {name: shapes[name].numel() * (1 - part) for name, part in left.items()}


def _ties(axis: Axis) -> str:
    """`2 write, 3 read: conv1, conv2 ...`, numbers without a matrix counted with neither."""
    named = {
        role: list(dict.fromkeys(m.parameter for m in axis.members if m.role == role))
        for role in ("writes", "reads", "carries")
    }
    counts = [f"{len(names)} {role}" for role, names in named.items() if names]
    both = list(dict.fromkeys(named["writes"] + named["reads"]))
    short = [name.removesuffix(".weight") for name in both[:_SHOWN]]
    more = " ..." if len(both) > _SHOWN else ""
    return ", ".join(counts) + (f": {', '.join(short)}{more}" if short else "")


def _layers(network: Network, counted: Macs) -> list[dict[str, Any]]:
    state = network.module.state_dict()
    each = weight_macs(counted, state)
    known = {layer.name: layer for layer in network.layers}
    rows = []
    for name in dict.fromkeys([*known, *each]):
        layer = known.get(name)
        rows.append(
            {
                "layer": name,
                "kind": layer.kind if layer else "other",
                "shape": "x".join(map(str, state[name].shape)),
                "calls": layer.calls if layer else 1,
                "parameters": state[name].numel(),
                "macs": each.get(name, 0),
                "macs_share": each.get(name, 0) / (counted.total or 1),
            }
        )
    return rows


def _smallest(couplings: Couplings, counted: Macs, shapes: Shapes) -> dict[str, int]:
    """Parameters and MACs of weights with one unit on every axis that is not locked."""
    keep = {axis.name: torch.zeros(1, dtype=torch.int64) for axis in couplings.free}
    kept = couplings.positions(keep)
    sizes = {}
    for name, shape in shapes.items():
        dims = [len(kept.get(name, {}).get(d, range(n))) for d, n in enumerate(shape)]
        sizes[name] = math.prod(dims)
    left = sum(sizes.get(name, 0) * share for name, share in counted.positions.items())
    return {"smallest_parameters": sum(sizes.values()), "smallest_macs": round(left)}


def _notes(network: Network, couplings: Couplings, counted: Macs) -> list[str]:
    said = [
        f"operator {name} has no rule: what it touches keeps its width ({', '.join(nodes[:3])})"
        for name, nodes in couplings.unknown.items()
    ]
    rest = counted.total - sum(weight_macs(counted, network.module.state_dict()).values())
    if rest > 0.005 * counted.total:
        said.append(
            f"{rest / counted.total:.0%} of the MACs are products of activations, such as"
            " attention's: no weight's, so no unit's"
        )
    return [*said, *network.notes]
