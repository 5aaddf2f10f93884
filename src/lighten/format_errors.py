"""What every layer of a network loses in every format, in nats of KL divergence.

The unit and the images are those of the curves of axes (lighten.curves), so that widths and formats
can be weighed against each other. Each weight alone is rounded on its float inputs, with error
feedback and the bias that makes up for the mean, and each tensor alone is rounded to its bits; from
there the network is run to its end. One pass over the graph. That the losses add up is an
assumption: what the whole mix loses is measured when it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lighten.mixture import Touch, layers, touching
from lighten.network import LINEAR, Network
from lighten.ranges import Histogram, edges_of, fit_edge, quantize_values
from lighten.registry import transforms
from lighten.rewrite import groups, value_of, weight_name
from lighten.rounding import Moments, columns, grouped, moments, rounded
from lighten.stepwise import Steps, Values, divergence, steps_of
from lighten.types import Spec
from lighten.walk import tensors_of

NUMBERS = 5_000_000
"""Of inputs, that the divergence is measured on; 16 to 128 examples."""


@dataclass(frozen=True, eq=False)
class FormatErrors:
    """weights: layer -> format's name -> nats. edges: what each tensor touches, and the nats when
    it alone is rounded."""

    weights: Mapping[str, Mapping[str, float]]
    edges: Sequence[tuple[Touch, float]]


@torch.no_grad()
def format_errors(
    network: Network,
    data: Tensor,
    formats: Sequence[str],
    *,
    activations: int | None = 8,
    batch: int = 32,
    tick: Callable[[int], None] | None = None,
) -> FormatErrors:
    """What rounding one weight, or one tensor, costs at the network's first output.

    data: (count, ...) inputs. formats: names, such as "int8_channel_sym". activations: bits of
    tensors; None: they stay float. tick: called once a layer.
    """
    network = transforms["fold_batchnorm"](network, data)
    count = min(128, max(16, NUMBERS // max(1, data[0].numel())))
    steps, batches = steps_of(network, data[:count], batch)
    todo = set(layers(steps.graph))
    touched = touching(steps.graph) if activations is not None else {}
    owners = set(edges_of(steps.graph).values()) & {e for e, t in touched.items() if t.names}
    truth = steps.whole(batches)
    values: Values = {}
    weights: dict[str, dict[str, float]] = {}
    edges = []
    for node in steps.nodes:
        name = weight_name(node)
        if name in todo:
            todo.discard(str(name))
            weights[str(name)] = _of_weight(steps, node, values, truth, formats)
            if tick:
                tick(1)
        values[node] = (
            list(batches) if node.op == "placeholder" else steps.compute(node, values, len(batches))
        )
        if node.name in owners:
            nats = _of_edge(steps, node, values, truth, activations or 8)
            edges.append((touched[node.name], nats))
        steps.forget(node, values)
    return FormatErrors(weights, edges)


def _of_weight(
    steps: Steps, node: fx.Node, values: Values, truth: list[Tensor], formats: Sequence[str]
) -> dict[str, float]:
    source, weight = tensors_of(node)[0], value_of(steps.graph, node.args[1])
    assert weight is not None
    g = groups(node)
    aim = weight.reshape(g, weight.shape[0] // g, -1)
    whole: Moments | None = None
    outputs = steps.compute(node, values, len(truth))
    for x, y in zip(values[source], outputs, strict=True):
        for piece, wanted in zip(x.split(2), y.split(2), strict=True):
            flat = (
                wanted.reshape(-1, wanted.shape[-1]).T.unsqueeze(0)
                if node.target in LINEAR
                else grouped(wanted.flatten(2), g)
            )
            new = moments(columns(node, piece, weight.shape[2:]), flat)
            whole = new if whole is None else whole + new
    assert whole is not None
    mean = whole.centred()[0]
    found = {}
    for name in formats:
        q = rounded(whole, aim, Spec(name, solver="gptq")).dense().view_as(aim)
        shift = ((aim - q) @ mean.unsqueeze(2)).flatten()
        if node.target not in LINEAR:
            shift = shift.view(-1, *[1] * (weight.ndim - 2))
        out = steps.rest(
            node, values, len(truth), {str(weight_name(node)): q.view_as(weight)}, {node: shift}
        )
        found[name] = _nats(truth, out)
    return found


def _of_edge(steps: Steps, node: fx.Node, values: Values, truth: list[Tensor], bits: int) -> float:
    seen = Histogram()
    lows, highs = zip(*((float(v.min()), float(v.max())) for v in values[node]), strict=True)
    seen.span(min(lows), max(highs))
    for value in values[node]:
        seen.add(value)
    edge = fit_edge(seen, bits)
    changed = {**values, node: [quantize_values(v, edge) for v in values[node]]}
    after = steps.order[node] + 1
    if after == len(steps.nodes):
        return _nats(truth, changed[node])
    return _nats(truth, steps.rest(steps.nodes[after], changed, len(truth), {}, {}))


def _nats(truth: list[Tensor], out: list[Tensor]) -> float:
    total = sum(len(t) for t in truth)
    return sum(float(divergence(t, o)) * len(t) / total for t, o in zip(truth, out, strict=True))
