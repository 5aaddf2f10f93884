"""Edit a network's graph: a copy to work on, new values for parameters, scaled channels.

Nothing is changed in place: parameters that an edit does not touch are shared with the network
that the graph came from, all others are new tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from lighten.errors import BadInput
from lighten.network import CONV, LINEAR, TRANSPOSED_CONV, Network, export_graph, graph_of

WEIGHTED = LINEAR | CONV | TRANSPOSED_CONV


def editable(network: Network) -> fx.GraphModule:
    """The network's graph for any batch size, with no operator that works in place."""
    inputs = tuple(torch.cat([x[:1], x[:1]]) for x in network.inputs)
    graph = graph_of(export_graph(network.module, inputs, batch=True))
    _functional(graph)
    return graph


def finished(network: Network, graph: fx.GraphModule) -> Network:
    """The network of an edited graph, without the parameters that nothing reads any more."""
    graph.graph.lint()  # type: ignore[no-untyped-call]
    # a plain graph module takes over only the parameters that are read
    return network.with_module(fx.GraphModule(graph, graph.graph))


def value_of(graph: fx.GraphModule, node: object) -> Tensor | None:
    """The tensor behind a get_attr node; None where it is no such node."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, last = str(node.target).rpartition(".")
    found = getattr(graph.get_submodule(owner), last)
    return found if isinstance(found, Tensor) else None


def weight_name(node: fx.Node) -> str | None:
    """The parameter that a convolution or linear reads as its weight; None for other nodes."""
    if node.op != "call_function" or node.target not in WEIGHTED:
        return None
    weight = node.args[1]
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def bias_node(node: fx.Node) -> object:
    """The node of a convolution's or linear's bias, or None."""
    return node.args[2] if len(node.args) > 2 else None


def groups(node: fx.Node) -> int:
    """Groups of a convolution, 1 of a linear."""
    if node.target in LINEAR:
        return 1
    slot = 8 if node.target is torch.ops.aten.convolution.default else 6
    return int(node.args[slot]) if len(node.args) > slot else 1  # type: ignore[arg-type]


def transposed(node: fx.Node) -> bool:
    """Whether the weight of a convolution is stored (in, out / groups, ...)."""
    general = node.target is torch.ops.aten.convolution.default
    return node.target in TRANSPOSED_CONV or (general and bool(node.args[6]))


def sole_reader(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether no other node reads this node's weight, under this or another name."""
    weight = value_of(graph, node.args[1])
    readers = [
        user
        for other in graph.graph.nodes
        if other.op == "get_attr" and value_of(graph, other) is weight
        for user in other.users
    ]
    return weight is not None and readers == [node]


def set_parameter(graph: fx.GraphModule, name: str, value: Tensor) -> None:
    """Put a new parameter in the place of `name`, or make it."""
    owner, _, last = name.rpartition(".")
    module: nn.Module = graph
    for part in owner.split(".") if owner else ():
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if last in module._buffers:
        delattr(module, last)
    setattr(module, last, nn.Parameter(value, requires_grad=False))


def set_weight(graph: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    """Give a node a new weight of the same shape; its weight must have no other reader."""
    weight = node.args[1]
    if not isinstance(weight, fx.Node):
        raise BadInput(f"node `{node.name}` computes its weight", "only parameters can be changed")
    set_parameter(graph, str(weight.target), value)


def set_bias(graph: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    """Give a node a bias of its own (out,), whether or not it had one."""
    name = f"{node.args[1]}_bias"
    weight = node.args[1]
    if isinstance(weight, fx.Node):
        stem = str(weight.target)
        name = stem.removesuffix("weight") + "bias" if stem.endswith("weight") else f"{stem}_bias"
    old = bias_node(node)
    if isinstance(old, fx.Node) and list(old.users) == [node] and old.op == "get_attr":
        set_parameter(graph, str(old.target), value)
        return
    taken = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    while name in taken:
        name += "_"
    set_parameter(graph, name, value)
    with graph.graph.inserting_before(node):
        new = graph.graph.get_attr(name)
    new.meta["val"] = value
    node.args = (*node.args[:2], new, *node.args[3:])


def scale_outputs(weight: Tensor, node: fx.Node, factor: Tensor) -> Tensor:
    """The weight whose outputs are those of `weight` times factor (out,)."""
    if not transposed(node):
        return weight * factor.view(-1, *[1] * (weight.ndim - 1))
    g = groups(node)
    per_group = weight.view(g, -1, *weight.shape[1:])
    return (per_group * factor.view(g, 1, -1, *[1] * (weight.ndim - 2))).view_as(weight)


def scale_inputs(weight: Tensor, node: fx.Node, factor: Tensor) -> Tensor:
    """The weight that does to inputs what `weight` does to inputs times factor (in,)."""
    if transposed(node):
        return weight * factor.view(-1, *[1] * (weight.ndim - 1))
    g = groups(node)
    per_group = weight.view(g, -1, *weight.shape[1:])
    return (per_group * factor.view(g, 1, -1, *[1] * (weight.ndim - 2))).view_as(weight)


def _functional(graph: fx.GraphModule) -> None:
    """Replace operators that work in place by those that do not; later readers of the changed
    tensor read the new one. Raises BadInput where a view of another tensor is changed."""
    order = {n: i for i, n in enumerate(graph.graph.nodes)}
    for node in list(graph.graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        plain = getattr(torch.ops.aten, schema.name.removeprefix("aten::").rstrip("_"), None)
        overload = getattr(plain, schema.overload_name or "default", None)
        changed = node.args[0]
        if overload is None or not isinstance(changed, fx.Node) or _is_view(changed):
            raise BadInput(
                f"node `{node.name}` ({node.target}) changes a part of a tensor in place",
                "write it without an operator that ends in `_`",
            )
        node.target = overload
        for user in [u for u in changed.users if order[u] > order[node]]:
            user.replace_input_with(changed, node)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    returns = schema.returns if schema is not None else ()
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
