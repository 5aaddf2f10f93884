"""The same network with channels zeroed instead of removed: what a shrunk one must equal."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from lighten.coupling.axes import Couplings, Keep, stored_names
from lighten.network import Network

Zeroed = Mapping[str, Mapping[int, Tensor]]
"""Stored tensor -> dimension -> positions that are zero."""


@torch.no_grad()
def masked(network: Network, couplings: Couplings, keep: Keep) -> Network:
    """A copy in which everything that writes, carries or reads a removed channel is zero there."""
    module = copy.deepcopy(network.module)
    zero_(stored(module), zeroed(couplings, keep))
    return network.with_module(module)


def zeroed(couplings: Couplings, keep: Keep) -> dict[str, dict[int, Tensor]]:
    """Where a masked network is zero."""
    divisors = _divisors(couplings)
    sizes = {(o.parameter, o.dim): o.size for o in couplings.trace.origins}
    found: dict[str, dict[int, Tensor]] = {}
    for name, dims in couplings.positions(keep).items():
        if name in divisors:  # nothing is divided by zero: what is divided is zero already
            continue
        for dim, kept in dims.items():
            gone = torch.ones(sizes[name, dim], dtype=torch.bool)
            gone[kept] = False
            found.setdefault(name, {})[dim] = gone.nonzero().flatten()
    return found


def stored(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@torch.no_grad()
def zero_(tensors: Mapping[str, Tensor], where: Zeroed) -> None:
    """Set these positions of the tensors to zero."""
    for name, dims in where.items():
        for dim, gone in dims.items():
            tensors[name].index_fill_(dim, gone.to(tensors[name].device), 0)


def _divisors(couplings: Couplings) -> set[str]:
    """Stored tensors by which something is divided."""
    ids = [x.reshape(-1).numpy() for x in couplings.trace.divisors]
    if not ids:
        return set()
    used = np.unique(np.concatenate(ids))
    return {
        o.parameter
        for o in couplings.trace.origins
        if o.role in (None, "carries")
        and bool(((used >= o.start) & (used < o.start + o.size)).any())
    }


__all__ = ["Zeroed", "masked", "stored", "stored_names", "zero_", "zeroed"]
