"""Compute what an integer runtime computes: rounded edges, decoded weights, biases in steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from lighten.quantized import Edge, Quantized
from lighten.ranges import quantize_values
from lighten.rewrite import bias_node, weight_name
from lighten.types import Compressed
from lighten.walk import tensors_of, walk


class Simulation(nn.Module):
    """A quantized network as a module for batches of any size."""

    def __init__(self, quantized: Quantized) -> None:
        super().__init__()
        self.quantized = quantized
        flexible = quantized.network.flexible
        # what torch.export makes refuses train() and eval(), though it has no mode
        self.graph_module = fx.GraphModule(flexible, flexible.graph)
        self.replaced = replaced_parameters(quantized, self.graph_module)

    def forward(self, *inputs: Tensor) -> Any:
        edges = self.quantized.edges

        def see(node: fx.Node, value: Any) -> Any:
            if node.op == "get_attr":
                found = self.replaced.get(str(node.target))
                return value if found is None else found.to(value.device)
            edge = edges.get(node.name)
            return value if edge is None else quantize_values(value, edge)

        return walk(self.graph_module, inputs, see)


def replaced_parameters(quantized: Quantized, graph: fx.GraphModule) -> dict[str, Tensor]:
    """Parameter -> its value as the runtime has it: decoded weights, biases on int32 grids."""
    found: dict[str, Tensor] = {}
    state = dict(graph.named_parameters(remove_duplicate=False)) | dict(graph.named_buffers())
    for name, weight in quantized.weights.items():
        like = state[name]
        found[name] = weight.dense().reshape(like.shape).to(like)
    for node in graph.graph.nodes:
        read, bias = weight_name(node), bias_node(node)
        if read is None or read not in quantized.weights or not isinstance(bias, fx.Node):
            continue
        sources = tensors_of(node)
        edge = quantized.edges.get(sources[0].name) if sources else None
        integers = "scale" in quantized.weights[read].parts  # else a float weight, only sparse
        if edge is not None and integers and bias.op == "get_attr":
            steps = bias_steps(edge, quantized.weights[read])
            found[str(bias.target)] = round_bias(state[str(bias.target)], steps)
    return found


def bias_steps(edge: Edge, weight: Compressed) -> Tensor:
    """(out,): what one unit of the int32 bias is worth, input scale * weight scale."""
    return edge.scale * weight.parts["scale"][:, 0].float()


def round_bias(bias: Tensor, steps: Tensor) -> Tensor:
    """The bias (out,) on its int32 grid."""
    steps = steps.to(bias.device)
    safe = torch.where(steps > 0, steps, 1.0)
    code = torch.round(bias / safe).clamp_(-(2.0**31), 2.0**31 - 1)
    return torch.where(steps > 0, code * safe, bias)
