"""Fold batch norms into the convolution or linear before them.

    y = γ (W x + b - μ) / √(σ² + ε) + β  =  (s W) x + (s (b - μ) + β),   s = γ / √(σ² + ε)

*Source:* Jacob et al. 2018, section 3.2.
"""

from __future__ import annotations

from torch import Tensor, fx

from lighten.network import Network
from lighten.registry import transforms
from lighten.rewrite import (
    bias_node,
    editable,
    finished,
    scale_outputs,
    set_bias,
    set_weight,
    sole_reader,
    value_of,
    weight_name,
)
from lighten.walk import operator


@transforms("fold_batchnorm")
def fold_batchnorm(network: Network, data: Tensor | None = None) -> Network:
    """A network in which no batch norm follows a convolution or linear that only it reads.

    Others, and those whose weight has other readers, stay. data: not needed.
    """
    graph = editable(network)
    for node in list(graph.graph.nodes):
        if operator(node) == "batch_norm":
            _fold(graph, node)
    return finished(network, graph)


def _fold(graph: fx.GraphModule, norm: fx.Node) -> None:
    source = norm.args[0]
    if not isinstance(source, fx.Node) or weight_name(source) is None or len(source.users) != 1:
        return
    gamma, beta, mean, var = (value_of(graph, norm.args[i]) for i in (1, 2, 3, 4))
    weight = value_of(graph, source.args[1])
    bias = value_of(graph, bias_node(source))
    computed = bias is None and bias_node(source) is not None
    if mean is None or var is None or weight is None or computed:
        return
    if operator(source) == "linear" and source.meta["val"].ndim != 2:
        return  # the norm's channels are not the linear's outputs
    if norm.args[5] or not sole_reader(graph, source):
        return
    scale = (var.double() + float(norm.args[7])).rsqrt()  # type: ignore[arg-type]
    if gamma is not None:
        scale = scale * gamma.double()
    shift = (0 if bias is None else bias.double()) - mean.double()
    shift = shift * scale + (0 if beta is None else beta.double())
    set_weight(graph, source, scale_outputs(weight.double(), source, scale).to(weight.dtype))
    set_bias(graph, source, shift.to(weight.dtype))
    norm.replace_all_uses_with(source)
    graph.graph.erase_node(norm)
