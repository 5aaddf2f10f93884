"""Batch norms in exported graphs learn as those in modules do.

torch.export writes down that a norm is in evaluation mode. While a graph is trained, its norms ask
the graph module instead, and so see the batch and learn its statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from lighten.walk import operator

MOMENTUM = 0.1
"""Of running statistics whose norm was exported without one."""


@contextmanager
def learning_norms(module: nn.Module) -> Iterator[None]:
    """Batch norms of all graphs in `module` follow its training mode for as long as this lasts."""
    changed: list[tuple[fx.GraphModule, fx.Node, Any, tuple[Any, ...]]] = []
    for graph in module.modules():
        if not isinstance(graph, fx.GraphModule):
            continue
        for node in graph.graph.nodes:
            if operator(node) == "batch_norm" and node.args[3] is not None and not node.args[5]:
                changed.append((graph, node, node.target, node.args))
                node.target = _norm(graph)
                node.args = (*node.args[:5], *node.args[6:8])
    graphs = {id(graph): graph for graph, *_ in changed}.values()
    for graph in graphs:
        graph.recompile()
    try:
        yield
    finally:
        for _, node, target, args in changed:
            node.target, node.args = target, args
        for graph in graphs:
            graph.recompile()


def has_norms(module: nn.Module) -> bool:
    """Whether a module, or a graph in it, has a batch norm."""
    parts = list(module.modules())
    graphs = [part for part in parts if isinstance(part, fx.GraphModule)]
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in parts) or any(
        operator(node) == "batch_norm" for graph in graphs for node in graph.graph.nodes
    )


def _norm(graph: fx.GraphModule) -> Any:
    def batch_norm(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
        momentum: float, eps: float,
    ) -> Tensor:  # fmt: skip
        return torch.batch_norm(
            x, weight, bias, mean, var, graph.training, momentum or MOMENTUM, eps, False
        )

    return batch_norm
