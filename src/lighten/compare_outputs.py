"""How far the outputs of two networks are apart."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from lighten.network import Network

COARSE = 1e-6
"""Relative errors from here on may be noise of the network's own dtype."""


@torch.no_grad()
def difference(a: Network, b: Network) -> float:
    """Largest relative error (Euclidean norm) of a's outputs against b's on example inputs.

    Not a number where b's outputs are not finite. In float64 where its own dtype is too coarse to
    say. On the meta device 0 where the shapes are equal, else infinite.
    """
    if a.inputs[0].is_meta:
        return distance(_shapes(a), _shapes(b))
    inputs = probes(a.inputs)
    error = distance(a(*inputs), b(*inputs))
    if COARSE < error < float("inf"):
        exact = [copy.deepcopy(n.module).double() for n in (a, b)]
        wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        try:
            error = distance(exact[0](*wide), exact[1](*wide))
        except RuntimeError:  # a forward that names its dtype: float32 has the last word
            return error
    return error


def probes(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Example inputs; constant ones, which would hide differences, replaced by random ones."""
    found = []
    for i, x in enumerate(inputs):
        if x.is_floating_point() and x.numel() > 1 and bool((x == x.reshape(-1)[0]).all()):
            generator = torch.Generator().manual_seed(i)
            x = torch.randn(x.shape, generator=generator).to(x)
        found.append(x)
    return tuple(found)


def distance(a: Any, b: Any) -> float:
    """The same for outputs: tensors in any nesting."""
    left, right = (_tensors(v) for v in (a, b))
    if [x.shape for x in left] != [y.shape for y in right]:
        return float("inf")
    worst = 0.0
    for x, y in zip(left, right, strict=True):
        if x.is_meta or not x.numel():
            continue
        if not bool(torch.isfinite(y).all()):
            return float("nan")
        x, y = x.double(), y.double()
        scale = float(y.norm()) or 1.0
        worst = max(worst, float((x - y).norm()) / scale)
    return worst


def _shapes(network: Network) -> list[Tensor]:
    """What a network on the meta device returns, as its trace says."""
    output = next(iter(reversed(network.graph.graph.nodes)))
    found = [n.meta["val"] for n in output.all_input_nodes]
    return [torch.empty(v.shape, device="meta") for v in found if isinstance(v, Tensor)]


def _tensors(value: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, Tensor)]
