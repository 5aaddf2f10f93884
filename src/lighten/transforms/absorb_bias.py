"""Absorb high biases: what a channel never falls below moves through relu into the next bias.

    W relu(z) + b  =  W relu(z - c) + (b + W c)      where z >= c >= 0

The tensor between then begins at 0 and spends no steps on [0, c]. Nothing bounds z on other data,
and where it falls below c the output would change; so c stays well below all that was seen. Readers
that pad with zeros would have to pad with -c: they, and relu6, stay as they are.

*Source:* Nagel et al. 2019, "Data-Free Quantization", section 4.1.3 (there c is three standard
deviations below the mean that batch norm gives, and what falls below it is an error).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from lighten.network import LINEAR, Network, batches
from lighten.registry import transforms
from lighten.rewrite import (
    bias_node,
    editable,
    finished,
    groups,
    set_bias,
    transposed,
    value_of,
    weight_name,
)
from lighten.walk import operator, walk

MARGIN = 2.0
"""How far c lies below the least value seen, in ranges (greatest - least) of its channel."""


@transforms("absorb_bias")
def absorb_bias(network: Network, data: Tensor | None = None, margin: float = MARGIN) -> Network:
    """A network that computes the same, with channels that lay far above 0 moved down to it.

    data: (count, ...), seen in batches; without it nothing is absorbed.
    """
    graph = editable(network)
    writers = [node for node in graph.graph.nodes if _readers(graph, node)]
    if data is None or not writers:
        return finished(network, graph)
    for writer, (least, greatest) in _spans(graph, network, writers, data).items():
        shift = (least - margin * (greatest - least)).clamp(min=0)
        if not bool(shift.any()):
            continue
        bias = value_of(graph, bias_node(writer))
        set_bias(graph, writer, -shift if bias is None else bias - shift)
        for reader in _readers(graph, writer):
            carried = _carried(graph, reader, shift)
            bias = value_of(graph, bias_node(reader))
            set_bias(graph, reader, carried if bias is None else bias + carried)
    return finished(network, graph)


def _readers(graph: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The nodes that read a weight's outputs through one relu, where all of them can take up a
    bias; else none."""
    if not _biased(graph, node) or len(node.users) != 1:
        return []
    relu = next(iter(node.users))
    if operator(relu) != "relu":
        return []
    linear = node.target in LINEAR
    good = all(
        _biased(graph, user)
        and (user.target in LINEAR) == linear
        and user.args[0] is relu
        and not transposed(user)
        and not _pads(user)
        for user in relu.users
    )
    return list(relu.users) if good else []


def _biased(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node has a known weight and can be given another bias."""
    if weight_name(node) is None or value_of(graph, node.args[1]) is None:
        return False
    bias = bias_node(node)
    return bias is None or value_of(graph, bias) is not None


def _pads(node: fx.Node) -> bool:
    """Whether a convolution sees numbers that its input does not hold."""
    if node.target in LINEAR:
        return False
    padding = node.args[4] if len(node.args) > 4 else 0
    if padding == "same":
        kernel = node.args[1].meta["val"].shape[2:]  # type: ignore[union-attr]
        return any(k > 1 for k in kernel)
    if isinstance(padding, list | tuple):
        return any(padding)
    return padding not in (0, "valid")


def _spans(
    graph: fx.GraphModule, network: Network, writers: list[fx.Node], data: Tensor
) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    """The least and the greatest value (out,) of each channel before the relu."""
    wanted = set(writers)
    found: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def see(node: fx.Node, value: object) -> object:
        if node in wanted and isinstance(value, Tensor):
            channels = value.movedim(-1 if node.target in LINEAR else 1, 0).flatten(1)
            low, high = channels.amin(1), channels.amax(1)
            if node in found:
                low, high = torch.minimum(found[node][0], low), torch.maximum(found[node][1], high)
            found[node] = low, high
        return value

    for batch in batches(data, 10, network.device):
        walk(graph, (batch,), see)
    return found


def _carried(graph: fx.GraphModule, node: fx.Node, shift: Tensor) -> Tensor:
    """(out,): what a node's weight makes of inputs that are `shift` (in,) everywhere."""
    weight = value_of(graph, node.args[1])
    assert weight is not None  # readers have one
    g = groups(node)
    summed = weight.reshape(g, weight.shape[0] // g, weight.shape[1], -1).sum(3)
    return (summed @ shift.view(g, -1, 1)).flatten()
