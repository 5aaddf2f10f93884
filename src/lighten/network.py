"""A network in memory that runs on example inputs: any nn.Module, not only a language model.

Everything that looks inside reads the `torch.export` graph (ATen operators, parameters by their
state-dict names), so no architecture is known by name.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from lighten.errors import BadInput, WrongUse
from lighten.types import Layer

aten = torch.ops.aten

LINEAR = {aten.linear.default}
CONV = {
    aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding,
    aten.conv3d.default, aten.conv3d.padding, aten.convolution.default,
}  # fmt: skip
TRANSPOSED_CONV = {
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}


@dataclass(frozen=True, eq=False)
class Network:
    """A module in evaluation mode and what it is called with.

    inputs: positional example inputs, first dimension the batch, on the module's device. source:
    what the user called it. The module is lighten's own copy (`Network.of`): never the user's.
    notes: what its user should know of it.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    source: str = "a module"
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, module: nn.Module, inputs: Any, source: str = "") -> Network:
        """A copy of `module`, in evaluation mode. inputs: a tensor or a tuple of them.

        Raises WrongUse where they are no module and the tensors that its forward takes, BadInput
        for NaN in the weights.
        """
        if not isinstance(module, nn.Module):
            raise WrongUse(f"a {type(module).__name__} is not a torch.nn.Module", "pass a module")
        given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        if not given or not all(isinstance(x, Tensor) for x in given):
            raise WrongUse(
                "example inputs must be tensors", "for an image: torch.zeros(1, 3, h, w)"
            )
        source = source or type(module).__name__
        if takes := _other_inputs(module, len(given)):
            raise WrongUse(
                f"{source} takes {takes}, and the example inputs are {len(given)}",
                "give a tensor for each argument of its forward, in its order",
            )
        own = copy.deepcopy(module).eval().requires_grad_(False)
        for name, t in own.state_dict().items():
            if t.is_floating_point() and not t.is_meta and not bool(torch.isfinite(t).all()):
                raise BadInput(
                    f"`{name}` holds values that are NaN or infinite",
                    "the weights are damaged, or were trained or converted wrongly",
                )
        return cls(own, given, source)

    def with_module(self, module: nn.Module) -> Network:
        """The same, with another module in its place (not copied)."""
        return Network(module.eval(), self.inputs, self.source, self.notes)

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The module as an ATen graph, sizes those of the example inputs; raises BadInput."""
        return export_graph(self.module, self.inputs)

    @cached_property
    def graph(self) -> fx.GraphModule:
        """The same as a module: parameters and buffers are get_attr nodes, named as in the state
        dict; every node's meta["val"] has its shape. Shares its tensors with `module`."""
        return graph_of(self.program)

    @cached_property
    def flexible(self) -> fx.GraphModule:
        """The graph for any batch size, its nodes named as in `graph`; raises BadInput."""
        inputs = tuple(torch.cat([x[:1], x[:1]]) for x in self.inputs)  # 1 would be traced as fixed
        return graph_of(export_graph(self.module, inputs, batch=True))

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Every weight of a convolution or linear operator, in the order of execution, as
        (out, in): of a convolution, in is channels / groups * kernel height * kernel width."""
        found: dict[str, Layer] = {}
        for node, name in weighted(self.graph):
            shape = node.args[1].meta["val"].shape  # type: ignore[union-attr]
            if name in found:
                old = found[name]
                found[name] = Layer(name, old.kind, old.shape, old.calls + 1)
                continue
            kind = "linear" if node.target in LINEAR else "conv"
            found[name] = Layer(name, kind, (shape[0], shape[1:].numel()))
        return tuple(found.values())

    @cached_property
    def parameters(self) -> int:
        """How many parameters, tied ones once."""
        return sum(p.numel() for p in self.module.parameters())

    @cached_property
    def nbytes(self) -> int:
        """Bytes of parameters and buffers, tied ones once."""
        tensors = {id(t): t for t in (*self.module.parameters(), *self.module.buffers())}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    @cached_property
    def digest(self) -> str:
        """sha256 in hex of names, shapes and values of the state dict."""
        sha = hashlib.sha256()
        for name, t in sorted(self.module.state_dict().items()):
            sha.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
            if not t.is_meta:
                sha.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        """What the module gives; raises WrongUse for fewer inputs than it takes."""
        self.check_inputs(len(inputs))
        return self.module(*inputs)

    def check_inputs(self, count: int = 1) -> None:
        """Raises WrongUse where data gives `count` inputs and the module takes more."""
        if count < len(self.inputs) and _other_inputs(self.module, count):
            raise WrongUse(
                f"{self.source} takes {len(self.inputs)} inputs, and the data gives {count}",
                "wrap it in a module that takes one tensor",
            )


def described_inputs(inputs: Iterable[Tensor]) -> list[list[Any]]:
    """[[shape, type], ...], for a JSON.

    >>> described_inputs([torch.zeros(2, 3)])
    [[[2, 3], 'float32']]
    """
    return [[list(x.shape), str(x.dtype).removeprefix("torch.")] for x in inputs]


def inputs_of(described: Iterable[Any]) -> tuple[Tensor, ...]:
    """Inputs of these shapes; raises TypeError, ValueError or AttributeError where they are none.

    >>> inputs_of([[[1, 2], "int64"]])
    (tensor([[0, 0]]),)
    """
    found = []
    for shape, name in described:
        dtype = getattr(torch, name)
        if not isinstance(dtype, torch.dtype) or not all(isinstance(n, int) for n in shape):
            raise TypeError(f"an input of {name} {shape}")
        found.append(torch.zeros(shape, dtype=dtype))
    return tuple(found)


def _other_inputs(module: nn.Module, count: int) -> str:
    """The arguments of a module's forward where `count` positional ones are not what it takes."""
    if module._forward_pre_hooks:  # these may change the arguments
        return ""
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):  # of some compiled callables
        return ""
    try:
        signature.bind(*range(count))
    except TypeError:
        return str(signature).partition(" ->")[0]
    return ""


def export_graph(
    module: nn.Module, inputs: tuple[Tensor, ...], batch: bool = False
) -> torch.export.ExportedProgram:
    """The ATen graph of a module in evaluation mode. batch: the first dimension of all inputs may
    have any size. Raises BadInput where torch.export cannot trace it."""
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs) if batch else None
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # A recurrent layer collects its own parameters in a list while it is called.
            warnings.filterwarnings("ignore", ".*were assigned during export", UserWarning)
            return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises dozens of kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise BadInput(
            f"torch.export cannot trace {type(module).__name__}: {type(error).__name__}: {first}",
            "a forward that depends on values of tensors has to be rewritten with torch operators",
        ) from error


def graph_of(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """A program's module without the calls that only check shapes."""
    graph: fx.GraphModule = program.module()  # type: ignore[assignment]
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and str(node.target) == "_guards_fn":
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def weighted(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
    """(node, parameter's name) of every convolution and linear whose weight is a parameter."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in LINEAR | CONV | TRANSPOSED_CONV:
            weight = node.args[1]
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                yield node, str(weight.target)


def batches(data: Tensor | Iterable[Any], size: int, device: torch.device) -> Iterator[Tensor]:
    """A tensor (count, ...) in batches, on the device; an iterable of batches as it comes."""
    if isinstance(data, Tensor):
        for start in range(0, len(data), size):
            yield data[start : start + size].to(device)
        return
    for item in data:
        first = item[0] if isinstance(item, tuple | list) else item
        yield first.to(device)
