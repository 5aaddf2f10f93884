"""What one edge, or one weight, costs at the outputs when it alone is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lighten.network import batches
from lighten.quantized import Edge, Quantized
from lighten.ranges import quantize_values
from lighten.simulate import replaced_parameters
from lighten.walk import walk


def noise_ratio(reference: Tensor, output: Tensor) -> float:
    """Power of the error over the power of the reference."""
    power = float(reference.double().square().sum())
    return float((output - reference).double().square().sum()) / max(power, 1e-300)


@torch.no_grad()
def sensitivity(quantized: Quantized, data: Tensor, size: int = 8) -> dict[str, float]:
    """Edge or weight -> noise power at the first output, as a share of the signal's, when nothing
    else is quantized. data: a few images; each costs one run of the network per edge and weight.

    Edges that have one quantizer count as one, under the name of the first.
    """
    graph = quantized.network.flexible
    parameters = replaced_parameters(quantized, graph)
    owners: dict[int, list[str]] = {}
    for name, edge in quantized.edges.items():
        owners.setdefault(id(edge), []).append(name)
    totals: dict[str, float] = {}
    count = 0
    for batch in batches(data, size, quantized.network.device):
        reference = first_tensor(_run(graph, batch, {}, {}))
        for names in owners.values():
            edges = {name: quantized.edges[name] for name in names}
            output = first_tensor(_run(graph, batch, edges, {}))
            totals[names[0]] = totals.get(names[0], 0) + noise_ratio(reference, output)
        for name in quantized.weights:
            output = first_tensor(_run(graph, batch, {}, {name: parameters[name]}))
            totals[name] = totals.get(name, 0) + noise_ratio(reference, output)
        count += 1
    return {name: total / count for name, total in totals.items()}


def _run(
    graph: fx.GraphModule, batch: Tensor, edges: Mapping[str, Edge], weights: Mapping[str, Tensor]
) -> Any:
    def see(node: fx.Node, value: Any) -> Any:
        if node.op == "get_attr":
            return weights.get(str(node.target), value)
        edge = edges.get(node.name)
        return value if edge is None else quantize_values(value, edge)

    return walk(graph, (batch,), see)


def first_tensor(output: Any) -> Tensor:
    """The first tensor of a network's outputs."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output
