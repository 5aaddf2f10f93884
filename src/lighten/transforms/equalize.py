"""Equalize channels: scale each channel of a stream so that all of them fill the range alike.

A tensor has one scale, so a channel with a tenth of the widest range has a tenth of the steps.
Writers multiply by 1/s, readers by s: with s = r^α / v^(1-α), r the channel's range and v the
largest weight that reads it, steps move from the weights to the activations as α grows to 1.
A stream with relu6 stays as it is: its bound would have to differ by channel. Keeping the bound and
scaling only channels that never reached it on the data is not the same function elsewhere (measured
on EfficientNet-Lite0, other photographs: 10 to 15 dB of noise, from no quantization at all).

*Source:* Nagel et al. 2019, "Data-Free Quantization", section 4.1 (two layers, weights alone);
Xiao et al. 2023, "SmoothQuant", equation 4 (the exponent).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from lighten.channels import Stream, streams
from lighten.network import Network, batches
from lighten.ranges import edges_of
from lighten.registry import transforms
from lighten.rewrite import (
    bias_node,
    editable,
    finished,
    groups,
    scale_inputs,
    scale_outputs,
    set_bias,
    set_weight,
    transposed,
    value_of,
)
from lighten.walk import walk

ALPHA = 0.5
LARGEST = 64.0
"""No channel is scaled further, up or down: dead channels would be scaled without end."""


@transforms("equalize")
def equalize(network: Network, data: Tensor | None = None, alpha: float = ALPHA) -> Network:
    """A network that computes the same with channels of more equal ranges.

    data: (count, ...), seen in batches; without it ranges are guessed from the writers' weights.
    """
    graph = editable(network)
    found = [stream for stream in streams(graph) if not stream.clips]
    peaks = _peaks(graph, network, found, data) if data is not None else {}
    for stream in found:
        reach = [peaks[t] for t in stream.tensors if t in peaks]
        ranges = torch.stack(reach).amax(0) if reach else _written(graph, stream)
        scale = _scale(graph, stream, ranges, alpha)
        _apply(graph, stream, scale)
    return finished(network, graph)


def _peaks(
    graph: fx.GraphModule, network: Network, found: list[Stream], data: Tensor
) -> dict[fx.Node, Tensor]:
    """The largest magnitude (width,) of each channel of each tensor that is quantized."""
    edges = edges_of(graph)
    wanted = {tensor for stream in found for tensor in stream.tensors if tensor.name in edges}
    peaks: dict[fx.Node, Tensor] = {}

    def see(node: fx.Node, value: object) -> object:
        if node in wanted and isinstance(value, Tensor):
            peak = value.abs().transpose(0, 1).flatten(1).amax(1)
            peaks[node] = torch.maximum(peaks[node], peak) if node in peaks else peak
        return value

    for batch in batches(data, 10, network.device):
        walk(graph, (batch,), see)
    return peaks


def _written(graph: fx.GraphModule, stream: Stream) -> Tensor:
    """The largest weight (width,) that writes each channel."""
    return torch.stack([_largest(graph, n, transposed(n)) for n in stream.writers]).amax(0)


def _read(graph: fx.GraphModule, stream: Stream) -> Tensor:
    """The largest weight (width,) that reads each channel."""
    return torch.stack([_largest(graph, n, not transposed(n)) for n in stream.readers]).amax(0)


def _largest(graph: fx.GraphModule, node: fx.Node, second: bool) -> Tensor:
    """The largest magnitude for each index of a weight's first dimension, or of its second and the
    group."""
    weight = _weight(graph, node)
    if second:
        g = groups(node)
        weight = weight.reshape(g, len(weight) // g, weight.shape[1], -1).transpose(1, 2)
        weight = weight.reshape(g * weight.shape[1], -1)
    return weight.abs().flatten(1).amax(1)


def _scale(graph: fx.GraphModule, stream: Stream, ranges: Tensor, alpha: float) -> Tensor:
    """s (width,), its geometric mean 1; 1 for channels that are always 0 or never read."""
    read = _read(graph, stream)
    alive = (ranges > 0) & (read > 0)
    if not bool(alive.any()):
        return torch.ones_like(ranges)
    s = ranges.clamp(min=1e-30) ** alpha / read.clamp(min=1e-30) ** (1 - alpha)
    s = s / s[alive].log().mean().exp()  # the others' values are of no account
    return torch.where(alive, s, 1.0).clamp(1 / LARGEST, LARGEST)


def _apply(graph: fx.GraphModule, stream: Stream, scale: Tensor) -> None:
    for node in stream.writers:
        set_weight(graph, node, scale_outputs(_weight(graph, node), node, 1 / scale))
        bias = value_of(graph, bias_node(node))
        if bias is not None:
            set_bias(graph, node, bias / scale)
    for node in stream.readers:
        set_weight(graph, node, scale_inputs(_weight(graph, node), node, scale))


def _weight(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    weight = value_of(graph, node.args[1])
    assert weight is not None  # streams have no others
    return weight
