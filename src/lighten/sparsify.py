"""Sparse weights in a network: each pruned on what it sees, the network kept as it is otherwise."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lighten.errors import WrongUse
from lighten.moments import hessians
from lighten.network import Network
from lighten.quantized import Quantized
from lighten.registry import solvers
from lighten.sparse import format_of, nearest, unpack_mask
from lighten.types import Compressed, Spec, Stats

SOLVER = "obs"


def sparsify(
    network: Network,
    data: Tensor,
    specs: Mapping[str, Spec],
    stats: Mapping[str, Stats] | None = None,
) -> tuple[Network, dict[str, Compressed]]:
    """The network with the weights of `specs` pruned (or rounded) so, and those weights.

    data: (count, ...) inputs to calibrate on. specs: parameter -> spec; the others stay. stats:
    from lighten.moments.hessians, if they are at hand. All see the dense network's inputs: taking
    Hessians anew behind what is pruned already gained nothing on ResNet-20. Convolutions are
    (out, in / groups * kh * kw), patterns run along that. Raises WrongUse for
    parameters that are no weight of a layer, and for shapes that a spec cannot store.
    """
    layers = {layer.name: layer for layer in network.layers}
    for name, spec in specs.items():
        if name not in layers:
            raise WrongUse(
                f"`{name}` is no weight of a convolution or linear layer of {network.source}",
                "`lighten inspect` lists them",
            )
        why = format_of(spec).accepts(layers[name].shape)
        if why is not None:
            raise WrongUse(f"`{name}` cannot be {spec}: {why}", "leave it out, or another spec")
    seen = stats if stats is not None else hessians(network, data, names=list(specs))
    for name, spec in specs.items():
        if name not in seen and spec.solver != "magnitude":
            raise WrongUse(
                f"`{name}` has no Hessian (transposed convolutions get none)",
                f"leave it out, or prune it by {replace(spec, solver='magnitude')}",
            )
    weights = network.module.state_dict()
    done = {
        name: solve(weights[name].reshape(layer.shape).float(), seen.get(name), specs[name])
        for name, layer in layers.items()
        if name in specs
    }
    return with_weights(network, done), done


def solve(weight: Tensor, stats: Stats | None, spec: Spec) -> Compressed:
    """weight (out, in) by the spec's solver (obs where it names none).

    Where the Hessian is one for each group (groups, in, in), as grouped convolutions have it, a
    share is that of each group.
    """
    solver = solvers[spec.solver or SOLVER]
    if stats is None or stats.hessian.dim() == 2:
        found: Compressed = solver(weight, stats, spec)
        return found
    groups = stats.hessian.shape[0]
    parts = [
        solver(rows, replace(stats, hessian=stats.hessian[i]), spec)
        for i, rows in enumerate(weight.chunk(groups))
    ]
    format = parts[0].format
    pairs = [format.unpack(p.parts, p.shape) for p in parts]
    codes = torch.cat([c for c, _ in pairs])
    grid = {k: torch.cat([g[k] for _, g in pairs]) for k in pairs[0][1]}
    shape = (weight.shape[0], weight.shape[1])
    return Compressed(spec, shape, format, format.pack(codes, grid))


def without_zeros(made: Network | Quantized, sparse: Quantized) -> Quantized:
    """The same numbers with what was pruned marked in a bitmask instead of stored.

    made: what became of the network of `sparse`: itself, or its integers.
    """
    if not isinstance(made, Quantized):
        return sparse
    state = made.network.module.state_dict()
    weights = dict(made.weights)
    for name, pruned in sparse.weights.items():
        kept = mask_of(pruned)
        whole = made.weights.get(name)
        if whole is None:  # a layer that stays float, though its batch norm may be folded by now
            values = state[name].reshape(pruned.shape).float()
            weights[name] = nearest(values, kept, format_of(pruned.spec), None, pruned.spec)
            continue
        spec = replace(whole.spec, sparsity=pruned.spec.sparsity)
        codes, grid = whole.format.unpack(whole.parts, whole.shape)
        weights[name] = format_of(spec).compressed(codes, {**grid, "mask": kept}, spec)
    return replace(made, weights=weights)


def mask_of(weight: Compressed) -> Tensor:
    """(out, in) bool: what of a sparse weight is stored."""
    return unpack_mask(weight.parts["mask"], weight.shape[1])


def with_weights(network: Network, weights: Mapping[str, Compressed]) -> Network:
    """The network computing with what the compressed weights stand for."""
    module = copy.deepcopy(network.module)
    state = module.state_dict()
    with torch.no_grad():
        for name, weight in weights.items():
            state[name].copy_(weight.dense().reshape(state[name].shape))
    return network.with_module(module)
