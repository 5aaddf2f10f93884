"""A checkpoint as a module that computes: `lighten compress --export checkpoint` wrote it.

The factory of the whole network says the architecture; the checkpoint says which units stayed,
whether batch norms were folded, and all numbers. Where tensors between operators were rounded, what
comes back rounds them too: it computes in float what a runtime of integers would.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lighten.errors import BadInput
from lighten.exporters.checkpoint import ABOUT, Stored
from lighten.network import Network
from lighten.quantized import Quantized
from lighten.registry import exporters, transforms
from lighten.rewrite import bias_node, editable, finished, set_bias, value_of, weight_name
from lighten.saved import fill, narrowed
from lighten.simulate import Simulation


def is_checkpoint(folder: Path) -> bool:
    return (folder / ABOUT).is_file()


def load(factory: Callable[[], nn.Module], folder: Path) -> nn.Module:
    """The module that the checkpoint holds, in evaluation mode. factory: makes the whole one, any
    weights.

    Raises BadInput where the checkpoint is damaged or belongs to another network.
    """
    stored: Stored = exporters["checkpoint"].open(folder)
    built = stored.built
    if not built.inputs:
        raise BadInput(
            f"the checkpoint `{folder}` does not say what its network is called with",
            "it was written by an earlier lighten: write it again",
        )
    keep = {name: torch.tensor(units, dtype=torch.int64) for name, units in stored.kept.items()}
    network = narrowed(Network.of(factory(), built.inputs), keep, built.graph, folder)
    if built.folded:
        network = _folded(network, stored)
    fill(network.module, dict(stored.tensors), folder)
    if stored.edges:
        return Simulation(Quantized(network, dict(stored.weights), dict(stored.edges))).eval()
    return network.module.eval()


def _folded(network: Network, stored: Stored) -> Network:
    """Batch norms folded, and a bias where rounding has given one: as it was when it was stored."""
    network = transforms["fold_batchnorm"](network)
    graph = editable(network)
    for node in list(graph.graph.nodes):
        weight = stored.weights.get(weight_name(node) or "")
        if weight is None or "scale" not in weight.parts or bias_node(node) is not None:
            continue
        like = value_of(graph, node.args[1])
        if like is not None:
            set_bias(graph, node, like.new_zeros(weight.shape[0]))
    return finished(network, graph)
