"""The exported graph with channels removed: its static sizes are rewritten from the labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from lighten.coupling.axes import Left
from lighten.coupling.trace import operator_name
from lighten.surgery import Positions, taken

aten = torch.ops.aten


def regraph(
    graph: fx.GraphModule, stored: Mapping[str, str], left: Left, positions: Positions
) -> nn.Module:
    """A smaller graph module. stored: get_attr target -> name of the tensor; left: what stays of
    this graph's values; positions: and of its tensors."""
    nodes = _copy(graph.graph)
    for node in list(nodes.nodes):
        if node.op != "call_function":
            continue
        name = operator_name(node)
        if name == "_assert_tensor_metadata":
            nodes.erase_node(node)
            continue
        if name in REWRITES:
            REWRITES[name](left, node)
    nodes.eliminate_dead_code()
    root = _tensors(graph, nodes, stored, positions)
    small = fx.GraphModule(root, nodes)
    small.graph.lint()
    return small.eval()


def _copy(graph: fx.Graph) -> fx.Graph:
    """A copy that returns its outputs as plain tuples and dicts, where that is what they are.

    The flattening and unflattening code of an exported graph is left out: inputs are tensors, and
    its specification of trees cannot be copied without a warning.
    """
    nodes = fx.Graph()
    output = nodes.graph_copy(graph, {})
    code: Any = graph._codegen
    spec = getattr(getattr(code, "pytree_info", None), "out_spec", None)
    if spec is not None:
        result = torch.utils._pytree.tree_unflatten(list(output), spec)  # type: ignore[arg-type]
        if _is_plain(result):
            nodes.output(result)
            return nodes
        nodes.set_codegen(code)
    nodes.output(output)
    return nodes


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(_is_plain(v) for v in value)
    if type(value) is dict:
        return all(_is_plain(v) for v in value.values())
    return value is None or isinstance(value, fx.Node | int | float)


def _argument(node: fx.Node, name: str, default: Any = None) -> Any:
    for i, a in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if a.name == name:
            if i < len(node.args) and not a.kwarg_only:
                return node.args[i]
            return node.kwargs.get(name, a.default_value if a.has_default_value() else default)
    return default


def _put(node: fx.Node, name: str, value: Any) -> None:
    for i, a in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if a.name == name and i < len(node.args) and not a.kwarg_only:
            node.update_arg(i, value)
            return
    node.update_kwarg(name, value)


def _new_sizes(left: Left, node: fx.Node, name: str, free: bool) -> None:
    """Sizes of the result; free: the one that is not known may be written as -1."""
    value = left.value(node)
    old = list(_argument(node, name))
    new = left.shape(value)
    offset = len(new) - len(old)
    sizes: list[Any] = []
    unknown = sum(1 for s in old if not isinstance(s, int))
    for i, s in enumerate(old):
        if isinstance(s, int):
            sizes.append(
                s if s < 0 or value.shape[i + offset] == new[i + offset] else new[i + offset]
            )
        else:
            sizes.append(-1 if free and unknown == 1 and -1 not in old else s)
    if sizes != old:
        _put(node, name, sizes)


def _view(left: Left, node: fx.Node) -> None:
    key = "size" if operator_name(node) in ("view", "_unsafe_view") else "shape"
    _new_sizes(left, node, key, free=True)


def _expand(left: Left, node: fx.Node) -> None:
    _new_sizes(left, node, "size", free=False)


def _create(left: Left, node: fx.Node) -> None:
    _new_sizes(left, node, "size", free=False)


def _unflatten(left: Left, node: fx.Node) -> None:
    sizes = list(_argument(node, "sizes"))
    dim = _argument(node, "dim") % len(left.value(node.args[0]).shape)
    new = left.shape(left.value(node))[dim : dim + len(sizes)]
    _put(node, "sizes", [s if not isinstance(s, int) or s < 0 else n
                         for s, n in zip(sizes, new, strict=True)])  # fmt: skip


def _split(left: Left, node: fx.Node) -> None:
    dim = _argument(node, "dim", 0)
    parts = left.value(node)
    sizes = [left.size(v, dim) for v in parts]
    if sizes == [v.shape[dim] for v in parts]:
        return
    node.target = aten.split_with_sizes.default
    node.args = (node.args[0], sizes, dim)
    node.kwargs = {}


def _slice(left: Left, node: fx.Node) -> None:
    value = left.value(node.args[0])
    dim = _argument(node, "dim")
    stay = left.mask(value, dim)
    if bool(stay.all()):
        return
    for name in ("start", "end"):
        at = _argument(node, name)
        if isinstance(at, int) and at < 2**31:
            at = at + len(stay) if at < 0 else at
            _put(node, name, int(stay[:at].sum()))


def _narrow(left: Left, node: fx.Node) -> None:
    stay = left.mask(left.value(node.args[0]), _argument(node, "dim"))
    start, length = _argument(node, "start"), _argument(node, "length")
    if not bool(stay.all()):
        _put(node, "start", int(stay[:start].sum()))
        _put(node, "length", int(stay[start : start + length].sum()))


def _select(left: Left, node: fx.Node) -> None:
    stay = left.mask(left.value(node.args[0]), _argument(node, "dim"))
    at = _argument(node, "index")
    if isinstance(at, int) and not bool(stay.all()):
        _put(node, "index", int(stay[: at % len(stay)].sum()))


def _pad(left: Left, node: fx.Node) -> None:
    value = left.value(node)
    amounts = list(_argument(node, "pad"))
    for i in range(len(amounts) // 2):
        before, after = amounts[2 * i], amounts[2 * i + 1]
        stay = left.mask(value, len(value.shape) - 1 - i)
        if not bool(stay.all()):
            amounts[2 * i] = int(stay[:before].sum())
            amounts[2 * i + 1] = int(stay[len(stay) - after :].sum())
    _put(node, "pad", amounts)


def _convolution(left: Left, node: fx.Node) -> None:
    groups = _argument(node, "groups", 1)
    weight, x = left.value(_argument(node, "weight")), left.value(_argument(node, "input"))
    transposed = bool(_argument(node, "transposed", "transpose" in operator_name(node)))
    if groups > 1 and weight.shape[1] == 1 and not transposed:
        channel = len(x.shape) - (len(weight.shape) - 1)
        _put(node, "groups", left.size(x, channel))


def _group_norm(left: Left, node: fx.Node) -> None:
    x = left.value(_argument(node, "input"))
    groups = _argument(node, "num_groups")
    _put(node, "num_groups", groups * left.size(x, 1) // x.shape[1])


def _layer_norm(left: Left, node: fx.Node) -> None:
    x = left.value(_argument(node, "input"))
    n = len(_argument(node, "normalized_shape"))
    _put(node, "normalized_shape", left.shape(x)[-n:])


def _attention(left: Left, node: fx.Node) -> None:
    """Its scale is that of the whole head size, whatever is left of it."""
    if _argument(node, "scale") is None:
        _put(node, "scale", 1 / math.sqrt(left.value(node.args[0]).shape[-1]))


REWRITES: dict[str, Callable[[Left, fx.Node], None]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape"), _view),
    **dict.fromkeys(("expand", "broadcast_to"), _expand),
    **dict.fromkeys(("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "rand",
                     "randn"), _create),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _split),
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "scaled_dot_product_attention": _attention,
}  # fmt: skip
"""Operator -> how its static arguments follow its labels."""


def _tensors(
    graph: fx.GraphModule, nodes: fx.Graph, stored: Mapping[str, str], positions: Positions
) -> nn.Module:
    """A bare module that holds what the graph reads, cut, under the same names."""
    root = nn.Module()
    made: dict[str, Any] = {}
    for node in nodes.nodes:
        if node.op != "get_attr" or node.target in made:
            continue
        target = str(node.target)
        value: Any = graph
        for part in target.split("."):
            value = getattr(value, part)
        name = stored.get(target, target)
        if isinstance(value, Tensor):
            if name not in made:
                new = taken(value.detach(), positions.get(name, {})).clone()
                made[name] = nn.Parameter(new, False) if isinstance(value, nn.Parameter) else new
            made[target] = value = made[name]
        _set(root, target, value)
    return root


def _set(root: nn.Module, target: str, value: Any) -> None:
    *path, leaf = target.split(".")
    owner = root
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        owner.register_buffer(leaf, value)
    else:
        setattr(owner, leaf, value)
