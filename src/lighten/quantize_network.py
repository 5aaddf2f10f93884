"""Static quantization of a network after training: weights and activations, no gradient."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from lighten.cpu import saturates
from lighten.edge_sensitivity import first_tensor, noise_ratio, sensitivity
from lighten.errors import BadInput, WrongUse
from lighten.lockstep import Lockstep
from lighten.network import LINEAR, Network, batches
from lighten.quantized import Quantized
from lighten.ranges import METHODS, edges_of, fit_edge
from lighten.registry import formats, transforms
from lighten.rewrite import editable, finished, weight_name
from lighten.rounding import solvable
from lighten.simulate import Simulation
from lighten.types import Spec

BATCH = 10
HELD = 5
"""One in so many calibration images is kept to check a bar on."""


def quantize(
    network: Network,
    data: Tensor,
    *,
    bits_weights: int = 8,
    bits_activations: int | None = 8,
    group: int | None = None,
    keep_float: Collection[str] = (),
    bar: float | None = None,
    spare: int | None = None,
    reduce_range: bool | None = None,
    ranges: str = "mse",
    symmetric: bool = False,
    solver: str = "gptq",
    apply: Sequence[str] = ("fold_batchnorm",),
) -> Quantized:
    """network with weights rounded per channel, or in groups, and activations per tensor.

    data: (count, ...) of the network's input, normalised. bits_activations: None leaves them float,
    and then group is how many inputs of a linear weight share a scale and a zero point (32, 64 or
    128); weights of convolutions, and rows that are no multiple of it, stay per channel.
    keep_float: names of weights or of graph nodes (as in the transformed network) left float. bar:
    least signal-to-noise ratio in dB of the first output, on images that were kept from the
    calibration; the weights and edges that cost most are left float until it is met. spare: bits,
    such as 16, that the worst edges get before any is left float; for runtimes that multiply so
    many, which onnxruntime does in float. reduce_range: 8-bit weights use 7 bits, so that a
    processor whose sums of two products end at 16 bits makes no error; None: where it is needed
    here. ranges: how an edge's range is chosen. symmetric: signed activations with zero point 0.
    apply: transforms.

    Raises WrongUse for settings that cannot be, BadInput where the data is empty or not finite or
    no choice of float edges meets the bar.
    """
    _check(data, bits_weights, bits_activations, ranges)
    if group is not None:
        _check_group(group, bits_weights, bits_activations)
    if spare is not None and (bar is None or not (bits_activations or 16) < spare <= 16):
        raise WrongUse(
            f"edges cannot be spared with {spare} bits",
            "up to 16, more than the activations have, and a bar that says how many edges",
        )
    for name in apply:
        network = transforms[name](network, data)
    seen, held = data, data
    if bar is not None:
        at = torch.arange(len(data)) % HELD == HELD - 1
        if not bool(at.any()):
            raise WrongUse(f"a bar needs at least {HELD} images; here are {len(data)}")
        seen, held = data[~at], data[at]
    if reduce_range is None:
        reduce_range = bits_activations == 8 and saturates()
    # weights alone are multiplied in float, where nothing saturates
    stored = 7 if reduce_range and bits_weights == 8 and bits_activations else bits_weights
    kept = set(keep_float)

    def made(free: Collection[str] = (), wide: Collection[str] = ()) -> Quantized:
        bits = dict.fromkeys(wide, spare or 8)
        return _lockstep(
            network, seen, stored, bits_activations, group, kept.union(free), bits, ranges,
            symmetric, solver,
        )  # fmt: skip

    result = made()
    if bar is None:
        return result
    reached = quality(result, network, held)
    if reached >= bar:
        return result
    costs = sensitivity(result, held[:8])
    worst = sorted(costs, key=lambda name: (-costs[name], name))
    for free, wide in _choices(worst, set(result.edges), spare is not None):
        result = made(free, wide)
        reached = quality(result, network, held)
        if reached >= bar:
            return result
    raise BadInput(
        f"all in float reaches {reached:.1f} dB, not {bar:g} dB",
        "a bar counts noise beside the float network; is the network itself random?",
    )


def _choices(
    worst: Sequence[str], edges: Collection[str], spare: bool
) -> Iterator[tuple[set[str], set[str]]]:
    """(left float, spared with more bits), ever more of them: the worst first."""
    counts = sorted({min(1 << i, len(worst)) for i in range(len(worst).bit_length() + 1)})
    for count in counts if spare else ():
        free = set(worst[:count])
        yield free.difference(edges), free.intersection(edges)
    for count in counts:
        yield set(worst[:count]), set(worst[count:]).intersection(edges) if spare else set()


def quality(quantized: Quantized, network: Network, data: Tensor) -> float:
    """Signal-to-noise ratio in dB of the first output beside the float network's."""
    simulation = Simulation(quantized)
    float_graph = network.flexible
    pairs = []
    with torch.no_grad():
        for batch in batches(data, BATCH, network.device):
            pairs.append((first_tensor(float_graph(batch)), first_tensor(simulation(batch))))
    reference, output = (torch.cat(side) for side in zip(*pairs, strict=True))
    ratio = noise_ratio(reference, output)
    return -10 * math.log10(ratio) if ratio > 0 else math.inf


def _lockstep(
    network: Network, data: Tensor, bits_weights: int, bits_activations: int | None,
    group: int | None, keep: Collection[str], wider: Mapping[str, int], ranges: str,
    symmetric: bool, solver: str,
) -> Quantized:  # fmt: skip
    """wider: edges with bits of their own."""
    graph = editable(network)
    names = {n.name for n in graph.graph.nodes} | {n for n, _ in graph.named_parameters()}
    unknown = sorted(set(keep) - names)
    if unknown:
        raise WrongUse(
            f"nothing is called `{unknown[0]}` in the network",
            "names are those of parameters and graph nodes after the transforms",
        )
    specs = {
        name: Spec(_format(node, bits_weights, group), solver=solver)
        for node, name in _weights(graph)
        if name not in keep and node.name not in keep and solvable(node)
    }
    edges = edges_of(graph) if bits_activations is not None else {}
    edges = {name: owner for name, owner in edges.items() if not {name, owner} & set(keep)}
    step = Lockstep(
        graph, specs, edges,
        lambda name, seen: fit_edge(
            seen, wider.get(name, bits_activations or 8), symmetric=symmetric, signed=symmetric,
            method=ranges,
        ),
        refit=solver != "rtn",
    )  # fmt: skip
    step.run(list(batches(data, BATCH, network.device)))
    return Quantized(finished(network, graph), step.weights, step.chosen)


def _format(node: fx.Node, bits: int, group: int | None) -> str:
    """The format of a node's weight: in groups only a linear one whose rows they divide."""
    name = f"int{bits}_g{group}"
    if group is None or node.target not in LINEAR:
        return f"int{bits}_channel_sym"
    shape = node.args[1].meta["val"].shape  # type: ignore[union-attr]
    return name if formats[name].accepts(tuple(shape)) is None else f"int{bits}_channel_sym"


def _weights(graph: fx.GraphModule) -> list[tuple[fx.Node, str]]:
    pairs = [(node, weight_name(node)) for node in graph.graph.nodes]
    return [(node, name) for node, name in pairs if name is not None]


def _check_group(group: int, weights: int, activations: int | None) -> None:
    if activations is not None:
        raise WrongUse(
            f"groups of {group} weights and activations of {activations} bits",
            "groups are for weights alone: bits_activations=None",
        )
    if f"int{weights}_g{group}" not in formats:
        raise WrongUse(
            f"there are no {weights}-bit weights in groups of {group}", "groups of 32, 64 or 128"
        )


def _check(data: Tensor, weights: int, activations: int | None, ranges: str) -> None:
    if not isinstance(data, Tensor) or len(data) == 0:
        raise BadInput("there is no calibration data", "pass a tensor (count, ...) of inputs")
    if not bool(torch.isfinite(data).all()):
        raise BadInput("the calibration data holds NaN or infinite values", "is it normalised?")
    if weights not in (2, 3, 4, 8):
        raise WrongUse(f"weights cannot have {weights} bits", "8, 4, 3 or 2")
    if activations is not None and not 2 <= activations <= 16:
        raise WrongUse(f"activations cannot have {activations} bits", "2 to 16, or None for float")
    if ranges not in METHODS:
        raise WrongUse(f"ranges cannot be chosen by `{ranges}`", f"one of {', '.join(METHODS)}")
