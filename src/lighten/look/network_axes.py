"""The coupling view of a network: its axes, what hangs on each, and why some are locked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lighten.coupling import Couplings
from lighten.inspect_network import axis_row
from lighten.macs import macs
from lighten.network import Network


def axes(
    network: Network, couplings: Couplings, widths: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """One row an axis; see docs/reference/metrics-schema.md for the keys.

    widths: axis -> units kept, of the plan; axes that are not in it are whole.
    """
    counted = macs(network)
    shapes = {name: p.shape for name, p in network.module.named_parameters()}
    found = []
    for axis in couplings.axes:
        named = {
            role: list(dict.fromkeys(m.parameter for m in axis.members if m.role == role))
            for role in ("writes", "reads")
        }
        found.append(
            {
                "name": axis.name,
                "size": axis.width,
                "kept": (widths or {}).get(axis.name, axis.width),
                "locked": axis.locked,
                "writers": named["writes"],
                "readers": named["reads"],
                "macs_share": axis_row(axis, counted, shapes)["macs_share"],
            }
        )
    return found
