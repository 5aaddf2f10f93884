"""Remove channels: a smaller network that computes what the masked one computes."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import fx, nn

from lighten.compare_outputs import difference
from lighten.coupling.axes import Couplings, Keep, stored_names
from lighten.errors import BadInput, BadOutput
from lighten.masked import masked
from lighten.network import Network
from lighten.pretrained import restate
from lighten.regraph import regraph
from lighten.surgery import count_bare_norms, count_heads, cut

TOLERANCE = 1e-5
"""Largest relative error between a shrunk and a masked network."""


@torch.no_grad()
def shrink(network: Network, couplings: Couplings, keep: Keep) -> Network:
    """The network without the units that `keep` leaves out, checked against the masked one.

    It is the user's own class where that can be cut; where its forward has sizes baked in, the
    exported graph with its sizes rewritten, said in `notes`. On the meta device only shapes are
    checked. Raises WrongUse for units that cannot go, BadOutput where the result does not equal the
    masked network.
    """
    couplings.check(keep)
    expected = network if network.inputs[0].is_meta else masked(network, couplings, keep)
    tried = []
    for build in (own_module, graph_module):
        try:
            small = build(network, couplings, keep)
            error = difference(small, expected)
        except Exception as failure:  # a forward with baked-in sizes fails in any way it likes
            tried.append(_first_line(failure))
            continue
        if error <= TOLERANCE:
            return small
        tried.append(f"relative error {error:.2g}")
    raise BadOutput(
        f"removing units of {', '.join(keep)} does not equal zeroing them: as its own module: "
        f"{tried[0]}; as its graph: {tried[1]}",
        "keep one of these axes whole; `couple` has missed what it depends on",
    )


def own_module(network: Network, couplings: Couplings, keep: Keep) -> Network:
    """The user's own module, cut; not checked."""
    module = copy.deepcopy(network.module)
    cut(module, couplings.positions(keep))
    count_heads(module, couplings, keep)
    count_bare_norms(module, network, couplings.stay(keep))
    why = restate(module, couplings, keep)
    notes = () if why is None else (f"`from_pretrained` cannot build it: {why}",)
    return Network(module.eval(), network.inputs, network.source, notes)


def graph_module(network: Network, couplings: Couplings, keep: Keep) -> Network:
    """The network's graph, cut, for a batch of any size where it can be; not checked."""
    notes = [
        f"the forward of {network.source} has sizes written into it: this is its exported graph,"
        " with them rewritten"
    ]
    stored = stored_names(network.module)
    try:
        graph = network.flexible
        left = couplings.retrace(graph, stored, keep)
    except BadInput:
        graph, left = network.graph, couplings.stay(keep)
        size = network.inputs[0].shape[0] if network.inputs[0].dim() else 1
        notes.append(f"it works for a batch of {size} only")
    module = regraph(graph, stored, left, couplings.positions(keep))
    return Network(module, network.inputs, network.source, tuple(notes))


def is_graph(module: nn.Module) -> bool:
    """Whether a shrunk network had to become a graph."""
    return isinstance(module, fx.GraphModule)


@torch.no_grad()
def verified(network: Network, couplings: Couplings) -> Couplings:
    """The couplings with every axis locked of which removing a third does not equal zeroing it."""
    if network.inputs[0].is_meta or not couplings.free:
        return couplings
    third = {
        axis.name: torch.tensor([i for i in range(axis.width) if i % 3 != n % 2])
        for n, axis in enumerate(couplings.free)
    }
    if _error(network, couplings, third) <= TOLERANCE:
        return couplings
    why: dict[str, str] = {}
    for name, kept in third.items():
        error = _error(network, couplings, {name: kept})
        if not error <= TOLERANCE:
            why[name] = f"removing units does not equal zeroing them: relative error {error:.2g}"
    rest = {name: kept for name, kept in third.items() if name not in why}
    if rest and not _error(network, couplings, rest) <= TOLERANCE:
        why |= dict.fromkeys(rest, "removing units of all axes does not equal zeroing them")
    axes = tuple(replace(a, locked=why.get(a.name, a.locked)) for a in couplings.axes)
    return replace(couplings, axes=axes)


def _error(network: Network, couplings: Couplings, keep: Keep) -> float:
    stored = stored_names(network.module)
    small = regraph(network.graph, stored, couplings.stay(keep), couplings.positions(keep))
    try:
        return difference(network.with_module(small), masked(network, couplings, keep))
    except Exception:  # sizes that do not fit fail in any operator
        return float("inf")


def _first_line(failure: Exception) -> str:
    text = str(failure).strip()
    return f"{type(failure).__name__}: {text.splitlines()[0] if text else ''}"


__all__ = ["TOLERANCE", "difference", "graph_module", "masked", "own_module", "shrink", "verified"]
