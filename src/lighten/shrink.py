"""Remove channels: a smaller network that computes what the masked one computes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lighten.coupling.axes import Couplings, Keep, stored_names
from lighten.errors import BadInput, BadOutput
from lighten.masked import masked
from lighten.network import Network
from lighten.regraph import regraph
from lighten.surgery import count_heads, cut

TOLERANCE = 1e-5
"""Largest relative error between a shrunk and a masked network."""


@torch.no_grad()
def shrink(network: Network, couplings: Couplings, keep: Keep) -> Network:
    """The network without the units that `keep` leaves out, checked against the masked one.

    It is the user's own class where that can be cut; where its forward has sizes baked in, the
    exported graph with its sizes rewritten, said in `notes`. Raises WrongUse for units that cannot
    go, BadOutput where the result does not equal the masked network.
    """
    couplings.check(keep)
    expected = masked(network, couplings, keep)
    own, error = _own(network, couplings, keep, expected)
    if own is not None:
        return own
    found, worse = _graph(network, couplings, keep, expected)
    if found is not None:
        return found
    raise BadOutput(
        f"removing units of {', '.join(keep)} does not equal zeroing them: its own module: {error}; "
        f"its graph: {worse}",
        "`couple` has missed that these depend on something else: keep those axes whole",
    )


def _own(
    network: Network, couplings: Couplings, keep: Keep, expected: Network
) -> tuple[Network | None, str]:
    module = copy.deepcopy(network.module)
    try:
        cut(module, couplings.positions(keep))
        count_heads(module, couplings, keep)
        small = network.with_module(module)
        error = difference(small, expected)
    except Exception as failure:  # a forward with baked-in sizes fails in any way that it likes
        return None, _first_line(failure)
    if not error <= TOLERANCE:
        return None, f"relative error {error:.2g}"
    return small, ""


def _graph(
    network: Network, couplings: Couplings, keep: Keep, expected: Network
) -> tuple[Network | None, str]:
    notes = [f"{network.source} has sizes written into its forward: this is its graph, with them"
             " rewritten"]  # fmt: skip
    stored, positions = stored_names(network.module), couplings.positions(keep)
    try:
        graph = network.flexible
        left = couplings.retrace(graph, stored, keep)
    except BadInput:
        graph, left = network.graph, couplings.stay(keep)
        size = network.inputs[0].shape[0] if network.inputs[0].dim() else 1
        notes.append(f"it works for a batch of {size} only")
    module = regraph(graph, stored, left, positions)
    small = Network(module, network.inputs, network.source, tuple(notes))
    try:
        error = difference(small, expected)
    except Exception as failure:
        return None, _first_line(failure)
    return (small, "") if error <= TOLERANCE else (None, f"relative error {error:.2g}")


def _first_line(failure: Exception) -> str:
    text = str(failure).strip()
    return f"{type(failure).__name__}: {text.splitlines()[0] if text else ''}"


@torch.no_grad()
def difference(a: Network, b: Network) -> float:
    """Relative error of a's outputs against b's on example inputs; 0 on the meta device, where only
    shapes are compared. Where float32 is too coarse to say, float64 decides."""
    inputs = probes(a.inputs)
    error = _distance(a(*inputs), b(*inputs))
    if TOLERANCE < error < 1e-2:
        exact = [copy.deepcopy(n.module).double() for n in (a, b)]
        wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        try:
            error = _distance(exact[0](*wide), exact[1](*wide))
        except RuntimeError:  # a forward that names its dtype: float32 has the last word
            return error
    return error


def probes(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Example inputs; constant ones, which would hide differences, replaced by random ones."""
    found = []
    for i, x in enumerate(inputs):
        constant = x.is_floating_point() and not x.is_meta and x.numel() > 1
        if constant and bool((x == x.reshape(-1)[0]).all()):
            generator = torch.Generator().manual_seed(i)
            x = torch.rand(x.shape, generator=generator).to(x)
        found.append(x)
    return tuple(found)


def _distance(a: Any, b: Any) -> float:
    left, right = (_tensors(v) for v in (a, b))
    if len(left) != len(right):
        return float("inf")
    worst = 0.0
    for x, y in zip(left, right, strict=True):
        if x.shape != y.shape:
            return float("inf")
        if x.is_meta or not x.numel():
            continue
        x, y = x.double(), y.double()
        if not bool(torch.isfinite(y).all()):
            return float("nan")
        scale = float(y.norm()) or 1.0
        worst = max(worst, float((x - y).norm()) / scale)
    return worst


def _tensors(value: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, Tensor)]


__all__ = ["TOLERANCE", "difference", "masked", "nn", "shrink"]
