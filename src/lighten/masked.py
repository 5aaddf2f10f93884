"""The same network with channels zeroed instead of removed: what a shrunk one must equal."""

from __future__ import annotations

import copy

import numpy as np
import torch

from lighten.coupling.axes import Couplings, Keep, stored_names
from lighten.network import Network


@torch.no_grad()
def masked(network: Network, couplings: Couplings, keep: Keep) -> Network:
    """A copy in which everything that writes, carries or reads a removed channel is zero there."""
    module = copy.deepcopy(network.module)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    divisors = _divisors(couplings)
    for name, dims in couplings.positions(keep).items():
        if name in divisors:  # nothing is divided by zero: what is divided is zero already
            continue
        tensor = tensors[name]
        for dim, kept in dims.items():
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
            gone[kept] = False
            tensor.index_fill_(dim, gone.nonzero().flatten().to(tensor.device), 0)
    return network.with_module(module)


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


__all__ = ["masked", "stored_names"]
