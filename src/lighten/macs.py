"""Multiply-accumulates of a network, counted on its graph: of one example, batch 1.

Counted: convolutions, linears, matrix products, einsum, attention, recurrent layers. Look-ups,
norms, biases, activations and sums count nothing, as usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lighten.network import CONV, LINEAR, TRANSPOSED_CONV, Network

aten = torch.ops.aten


@dataclass(frozen=True)
class Macs:
    """MACs of one example. by_node: graph node -> MACs, those that count something.

    positions: parameter -> MACs of one stored element, summed over all its uses: output pixels of a
    convolution, tokens of a linear, steps of a recurrent layer. A weight's MACs are its size times
    that, so a slice of it costs its share.
    """

    total: int
    by_node: Mapping[str, int]
    positions: Mapping[str, float]


def macs(network: Network) -> Macs:
    """Count a network's MACs for one example; raises BadInput where it cannot be traced."""
    batch = int(network.inputs[0].shape[0]) if network.inputs[0].ndim else 1
    by_node: dict[str, int] = {}
    positions: dict[str, float] = {}
    for node in network.graph.graph.nodes:
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        if rule is None:
            continue
        found = 0
        for count, factor in rule(node):
            found += count
            parameter = _parameter(factor) if factor is not None else None
            if parameter is not None and _size(factor):
                share = count / _size(parameter) / batch
                name = str(parameter.target)
                positions[name] = positions.get(name, 0.0) + share
        if found:
            by_node[node.name] = round(found / batch)
    return Macs(sum(by_node.values()), by_node, positions)


Counts = Iterator[tuple[int, fx.Node | None]]
"""(MACs of the whole batch, the factor that may be a parameter) of each product in a node."""

_MOVES = {
    aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default,
    aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default,
    aten.expand.default, aten.contiguous.default, aten.clone.default, aten.alias.default,
    aten.detach.default, aten.detach_.default, aten.flatten.using_ints, aten.mT.default,
    aten.numpy_T.default, aten.unflatten.int, aten.to.dtype, aten.to.device, aten.to.dtype_layout,
    aten._to_copy.default,
}  # fmt: skip
"""Operators whose output is a parameter still, seen otherwise."""


def _parameter(node: fx.Node) -> fx.Node | None:
    """The parameter that a factor is a view of, or None."""
    while node.op == "call_function" and node.target in _MOVES:
        first = node.args[0]
        if not isinstance(first, fx.Node):
            return None
        node = first
    return node if node.op == "get_attr" else None


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta["val"]
    return tuple(int(n) for n in (value[0] if isinstance(value, tuple | list) else value).shape)


def _size(node: Any) -> int:
    return math.prod(_shape(node))


def _convolution(node: fx.Node) -> Counts:
    # every output pixel meets every weight of its output channel once
    weight: Any = node.args[1]
    out, kernel = _shape(node), _shape(weight)
    pixels = _size(node) // out[-len(kernel) + 1]
    yield pixels * _size(weight), weight


def _transposed(node: fx.Node) -> Counts:
    # here every input pixel meets every weight of its input channel once
    x, weight = node.args[0], node.args[1]
    pixels = _size(x) // _shape(x)[-len(_shape(weight)) + 1]
    yield pixels * _size(weight), weight  # type: ignore[misc]


def _either_convolution(node: fx.Node) -> Counts:
    return _transposed(node) if node.args[6] else _convolution(node)


def _linear(node: fx.Node) -> Counts:
    x, weight = node.args[0], node.args[1]
    yield _size(x) // _shape(x)[-1] * _size(weight), weight  # type: ignore[misc]


def _product(first: int) -> Callable[[fx.Node], Counts]:
    """Matrix products of the arguments `first` and `first` + 1."""

    def count(node: fx.Node) -> Counts:
        a, b = node.args[first], node.args[first + 1]
        # a product of activations with two parameters does not exist: it would be one parameter
        factor = b if _parameter(b) is not None else a  # type: ignore[arg-type]
        yield _size(node) * _shape(a)[-1], factor  # type: ignore[misc]

    return count


def _einsum(node: fx.Node) -> Counts:
    """Operands contracted from left to right, as torch does unless told otherwise."""
    text, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    terms, _, result = text.partition("->")
    names = [_letters(t, len(_shape(x))) for t, x in zip(terms.split(","), operands, strict=True)]
    if "->" not in text:
        flat = "".join(n for name in names for n in name if n.isalpha())
        result = "".join(sorted(n for n in set(flat) if flat.count(n) == 1))
        wanted = {n for name in names for n in name if not n.isalpha()} | set(result)
    else:
        wanted = set(result.replace("...", ""))
        wanted |= {n for name in names for n in name if not n.isalpha()}
    sizes: dict[str, int] = {}
    for name, x in zip(names, operands, strict=True):
        for n, size in zip(name, _shape(x), strict=True):
            sizes[n] = max(size, sizes.get(n, 1))
    have = set(names[0])
    for i in range(1, len(operands)):
        both = have | set(names[i])
        factor = operands[i] if _parameter(operands[i]) is not None else operands[0]
        yield math.prod(sizes[n] for n in both), factor if i == 1 or factor is operands[i] else None
        later = wanted.union(*names[i + 1 :])
        have = both & later


def _letters(term: str, dims: int) -> list[str]:
    """One name a dimension; those of `...` are numbered from the right, as they broadcast."""
    if "..." not in term:
        return list(term)
    before, _, after = term.partition("...")
    hidden = dims - len(before) - len(after)
    return [*before, *(str(i) for i in range(hidden, 0, -1)), *after]


def _attention(node: fx.Node) -> Counts:
    # all pairs are counted, also where a causal mask leaves half of them out
    q, k, v = (_shape(node.args[i]) for i in range(3))
    pairs = math.prod(q[:-1]) * k[-2]
    yield pairs * (q[-1] + v[-1]), None


def _recurrent(node: fx.Node) -> Counts:
    x, batch_first = _shape(node.args[0]), bool(node.args[8])
    steps = x[1] if batch_first and len(x) == 3 else x[0]
    examples = 1 if len(x) == 2 else x[0] if batch_first else x[1]
    for weight in node.args[2]:  # type: ignore[union-attr]
        if len(_shape(weight)) == 2:
            yield steps * examples * _size(weight), weight  # type: ignore[misc]


def _cell(node: fx.Node) -> Counts:
    examples = math.prod(_shape(node.args[0])[:-1])
    for weight in (node.args[2], node.args[3]):
        yield examples * _size(weight), weight  # type: ignore[misc]


def _bilinear(node: fx.Node) -> Counts:
    x, weight = node.args[0], node.args[2]
    yield _size(x) // _shape(x)[-1] * _size(weight), weight  # type: ignore[misc]


_RULES: dict[Any, Callable[[fx.Node], Counts]] = {
    **dict.fromkeys(CONV, _convolution),
    **dict.fromkeys(TRANSPOSED_CONV, _transposed),
    **dict.fromkeys(LINEAR, _linear),
    aten.convolution.default: _either_convolution,
    aten.conv_transpose2d.input: _transposed,
    aten.matmul.default: _product(0),
    aten.mm.default: _product(0),
    aten.bmm.default: _product(0),
    aten.mv.default: _product(0),
    aten.dot.default: _product(0),
    aten.addmm.default: _product(1),
    aten.baddbmm.default: _product(1),
    aten.einsum.default: _einsum,
    aten.scaled_dot_product_attention.default: _attention,
    aten.lstm.input: _recurrent,
    aten.gru.input: _recurrent,
    aten.rnn_tanh.input: _recurrent,
    aten.rnn_relu.input: _recurrent,
    aten.lstm_cell.default: _cell,
    aten.gru_cell.default: _cell,
    aten.rnn_tanh_cell.default: _cell,
    aten.rnn_relu_cell.default: _cell,
    aten.bilinear.default: _bilinear,
}


def weight_macs(counted: Macs, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """MACs that each parameter takes part in: its size times its positions."""
    return {n: round(weights[n].numel() * p) for n, p in counted.positions.items()}
