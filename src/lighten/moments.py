"""Hessians of a network's weights: X Xᵀ / n and means of what each weight is multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lighten.errors import BadInput
from lighten.network import Network, weighted
from lighten.patches import Window
from lighten.stepwise import Values, steps_of
from lighten.types import Stats

ROWS = 32768
"""Positions of a layer that are looked at, of all images together; the more the slower."""


@dataclass
class _Sums:
    n: int
    products: Tensor  # (groups, in, in)
    total: Tensor  # (groups, in)

    def stats(self) -> Stats:
        hessian, mean = self.products / self.n, self.total / self.n
        if len(hessian) == 1:
            hessian, mean = hessian[0], mean[0]
        return Stats(self.n, hessian, mean=mean)


@torch.no_grad()
def hessians(
    network: Network,
    data: Tensor,
    *,
    names: Collection[str] | None = None,
    rows: int = ROWS,
    batch: int = 64,
    seed: int = 0,
    tick: Callable[[int], None] | None = None,
) -> dict[str, Stats]:
    """Parameter -> Stats (hessian, mean) of the inputs of every convolution and linear.

    data: (count, ...) inputs. names: only these parameters. rows: positions of a layer that are
    looked at, picked at random, as many of each example. A weight that is read twice gets one
    Hessian of both inputs; transposed convolutions get none. Raises BadInput for NaN in the inputs.
    """
    steps, batches = steps_of(network, data, batch)
    wanted = _wanted(steps.graph, names)
    sums: dict[str, _Sums] = {}
    generator = torch.Generator().manual_seed(seed)
    total = sum(len(b) for b in batches)
    for x in batches:
        values: Values = {}
        for node in steps.nodes:
            values[node] = [x] if node.op == "placeholder" else steps.compute(node, values, 1)
            if node in wanted:
                name, window = wanted[node]
                source = node.args[0]
                found = moments_of(
                    window,
                    values[source][0],
                    values[node][0],
                    rows / total,
                    generator,  # type: ignore[index]
                )
                old = sums.get(name)
                if old is not None:
                    old.n, old.products, old.total = (
                        old.n + found.n, old.products + found.products, old.total + found.total,
                    )  # fmt: skip
                else:
                    sums[name] = found
            steps.forget(node, values)
        if tick:
            tick(1)
    for name, s in sums.items():
        if not bool(torch.isfinite(s.total).all()):
            raise BadInput(
                f"inputs of `{name}` are NaN or infinite on this data",
                "is the data scaled as the network was trained on it?",
            )
    return {name: s.stats() for name, s in sums.items()}


def moments_of(
    window: Window, x: Tensor, y: Tensor, share: float, generator: torch.Generator
) -> _Sums:
    """Sums over some positions of one batch. share: positions for each example."""
    count = y.shape[0]
    space = y.numel() // count // y.shape[1 if window.kernel else -1]
    at = window.positions(y, share / space, generator)
    inputs = window.inputs(x, at).float()
    return _Sums(len(at), inputs.transpose(1, 2) @ inputs, inputs.sum(1))


def _wanted(
    graph: fx.GraphModule, names: Collection[str] | None
) -> dict[fx.Node, tuple[str, Window]]:
    found = {}
    for node, name in weighted(graph):
        window = Window.of(node)
        if window is not None and (names is None or name in names):
            found[node] = (name, window)
    return found
