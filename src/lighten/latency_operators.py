"""The operators of a network that take time, as shapes: what a latency table is asked about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from lighten.errors import WrongUse
from lighten.network import CONV, LINEAR, Network, aten

_CLIPS = {"relu", "relu6", "hardtanh", "clamp", "clamp_min", "leaky_relu"}
_FREE = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "dropout", "detach", "alias",
    "_unsafe_view", "contiguous", "expand", "sym_size", "split", "split_with_sizes", "chunk",
    "batch_norm", "pad", "constant_pad_nd",
}  # fmt: skip
"""Operators that move no numbers, and those that a runtime folds into their neighbours."""


@dataclass(frozen=True)
class Operator:
    """One operator on one sample. Reads as `conv 32->64 k3x3 s1x1 p1x1 @56x56 clip`.

    kind: "conv", "linear" or "stream" (all else: `elements` are read and written in all). size:
    spatial of the input; of a linear, (rows,). clip: a ReLU or the like follows and is fused.
    """

    kind: str
    inputs: int = 0
    outputs: int = 0
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    size: tuple[int, ...] = ()
    clip: bool = False
    elements: int = 0

    def __str__(self) -> str:
        if self.kind == "stream":
            return f"stream {self.elements}"
        parts = [self.kind, f"{self.inputs}->{self.outputs}"]
        parts += [f"g{self.groups}"] if self.groups != 1 else []
        for letter, value in zip("kspd", self._shape(), strict=True):
            parts += [letter + "x".join(map(str, value))] if value else []
        parts.append("@" + "x".join(map(str, self.size)))
        return " ".join(parts + (["clip"] if self.clip else []))

    def _shape(self) -> tuple[tuple[int, ...], ...]:
        plain = all(d == 1 for d in self.dilation)
        return self.kernel, self.stride, self.padding, () if plain else self.dilation

    def at(self, inputs: int, outputs: int) -> Operator:
        """The same with other channel counts; a depthwise convolution stays one.

        Of a "stream", elements are in proportion to the channels. Raises WrongUse where the groups
        do not divide them.
        """
        if self.kind == "stream":
            before = self.inputs + self.outputs
            share = (inputs + outputs) / before if before else 1
            return replace(
                self, inputs=inputs, outputs=outputs, elements=round(self.elements * share)
            )
        groups = self.groups
        if self.kind == "conv" and 1 < groups == self.inputs:
            groups, outputs = inputs, outputs - outputs % inputs or inputs
        if inputs < 1 or outputs < 1 or inputs % groups or outputs % groups:
            raise WrongUse(f"{self} has no form with {inputs} inputs and {outputs} outputs")
        return replace(self, inputs=inputs, outputs=outputs, groups=groups)

    @property
    def bytes(self) -> int:
        """About what a probe of it takes in memory."""
        weights = self.inputs // self.groups * self.outputs * math.prod(self.kernel)
        return 4 * (weights + (self.inputs + self.outputs) * math.prod(self.size))


def operators(network: Network) -> dict[str, Operator]:
    """Graph node -> its operator, for all that take time; batch 1 whatever the example's."""
    found = {}
    for node in network.graph.graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        if node.target in CONV and not (node.target is aten.convolution.default and node.args[6]):
            found[node.name] = _conv(node)
        elif node.target in LINEAR:
            rows, inputs = node.args[0].meta["val"].shape[1:-1], node.args[1].meta["val"].shape[1]
            outputs = node.args[1].meta["val"].shape[0]
            found[node.name] = Operator(
                "linear", inputs, outputs, size=(math.prod(rows),), clip=_clipped(node)
            )
        elif _name(node) not in _FREE and not (_name(node) in _CLIPS and _follows(node)):
            found[node.name] = _stream(node)
    return found


def _conv(node: fx.Node) -> Operator:
    x, weight = (node.args[i].meta["val"] for i in (0, 1))  # type: ignore[union-attr]
    rank = weight.dim() - 2
    general = node.target is aten.convolution.default
    args: list[Any] = [*node.args[3:]] + [None] * 7
    kernel = tuple(weight.shape[2:])
    stride, dilation = _wide(args[0], rank, 1), _wide(args[2], rank, 1)
    groups = (args[5] if general else args[3]) or 1
    if isinstance(args[1], str):
        padding = tuple(
            d * (k - 1) // 2 if args[1] == "same" else 0
            for d, k in zip(dilation, kernel, strict=True)
        )
    else:
        padding = _wide(args[1], rank, 0)
    inputs, outputs = x.shape[-rank - 1], weight.shape[0]
    return Operator(
        "conv", inputs, outputs, groups, kernel, stride, padding, dilation,
        tuple(x.shape[-rank:]), _clipped(node),
    )  # fmt: skip


def _wide(value: Any, rank: int, default: int) -> tuple[int, ...]:
    if value is None:
        return (default,) * rank
    given = (value,) if isinstance(value, int) else tuple(value)
    return given * rank if len(given) == 1 else given


def _stream(node: fx.Node) -> Operator:
    own = node.meta["val"]
    sources = [n.meta["val"] for n in node.all_input_nodes if n.op != "get_attr"]
    tensors = [t for t in (*sources, own) if isinstance(t, Tensor)]
    elements = sum(t[:1].numel() if t.dim() else 1 for t in tensors)
    first = next((_channels(t) for t in sources if isinstance(t, Tensor)), 0)
    return Operator("stream", first, _channels(own), elements=elements)


def _channels(t: Tensor) -> int:
    shape: Sequence[int] = t.shape
    return shape[1] if len(shape) > 1 else 0


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0].rstrip("_")


def _clipped(node: fx.Node) -> bool:
    return len(node.users) == 1 and _name(next(iter(node.users))) in _CLIPS


def _follows(node: fx.Node) -> bool:
    source = node.all_input_nodes[0]
    return len(source.users) == 1 and (source.target in CONV | LINEAR or _name(source) == "add")
