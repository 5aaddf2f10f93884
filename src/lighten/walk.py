"""Run an ATen graph node by node, looking at or replacing what each node gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

See = Callable[[fx.Node, Any], Any]
"""(node, its value) -> the value that its readers get."""


def operator(node: fx.Node) -> str:
    """The operator's name without overload or the mark of working in place: "conv2d", "relu";
    "" for what is no operator.

    >>> import torch
    >>> node = torch.fx.Graph().call_function(torch.ops.aten.relu_.default, ())
    >>> operator(node)
    'relu'
    """
    if node.op != "call_function":
        return ""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet)).rstrip("_")


def tensors_of(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes that a node reads activations from: no parameters, no sizes."""
    return tuple(
        n for n in node.all_input_nodes if (n.op != "get_attr" and is_tensor(n)) or _many(n)
    )


def is_tensor(node: fx.Node) -> bool:
    """Whether a node gives one floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _many(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), list | tuple)


class _Walk(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, see: See) -> None:
        super().__init__(graph)
        self.see = see

    def run_node(self, n: fx.Node) -> Any:
        return self.see(n, super().run_node(n))


@torch.no_grad()
def walk(graph: fx.GraphModule, inputs: tuple[Tensor, ...], see: See) -> Any:
    """The graph's outputs, with what `see` makes of every node's value on the way."""
    return _Walk(graph, see).run(*inputs)
