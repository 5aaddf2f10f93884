"""A quantized network learned block by block: each block's output against the float network's.

A block gets the inputs that the quantized network gives it, as learned so far, and is moved towards
what the float network has at its end. One in four images is not learned from; a block keeps the
state that does best on those, which may be the one it began with.

*Source:* Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block
Reconstruction", algorithm 1; here with straight-through rounding and learned steps instead of a
soft one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lighten.errors import BadInput, WrongUse
from lighten.network import Network
from lighten.progress import stage
from lighten.quantized import Quantized
from lighten.segments import Segment, handed_on, segments
from lighten.trainable import Trainable, trainable

BATCH = 8
HELD = 4
"""One in so many images is held out."""
CHECKS = 4
"""Times that a block is judged on held-out images."""


@dataclass(frozen=True)
class Block:
    """What learning did to one block: its end, and the mean squared error there on held-out images
    before and after, as a share of the signal's power."""

    end: str
    before: float
    after: float


def learn_blocks(
    quantized: Quantized, dense: Network, data: Tensor, *, steps: int = 100, rate: float = 1e-3,
    mode: str = "all", seed: int = 0,
) -> tuple[Quantized, list[Block]]:  # fmt: skip
    """The network with every block learned for `steps` steps, and what came of each.

    dense: the float network with the same nodes, as after the transforms. data: (count, ...).
    Raises WrongUse where the graph has several inputs or the nodes differ, BadInput for too little
    data.
    """
    if len(data) < HELD:
        raise BadInput(f"{len(data)} images to learn from", f"give at least {HELD}")
    twin = trainable(quantized, mode)
    reference = dense.flexible
    names = {n.name: n for n in reference.graph.nodes}
    blocks = segments(twin.graph_module, quantized.weights, quantized.edges)
    if not blocks:
        raise WrongUse(
            "this network has several inputs or outputs, and blocks are learned along one",
            "learn it as a whole: lighten.trainable",
        )
    gone = [n.name for b in blocks for n in b.nodes if n.name not in names]
    if gone:
        raise WrongUse(
            f"the float network has no node `{gone[0]}`",
            "give the one that the transforms made, not the one before",
        )
    others = segments(reference, quantized.weights, quantized.edges)
    at = held_quarter(len(data))
    ours = [data[~at].to(dense.device), data[at].to(dense.device)]
    theirs = list(ours)
    with torch.no_grad():
        ours = [twin.seen(blocks[0].source, x) for x in ours]
    found = []
    with stage("learn blocks", len(blocks), "blocks") as tick:
        for i, (block, other) in enumerate(zip(blocks, others, strict=True)):
            theirs = [handed_on(reference, other, x, _plain, BATCH) for x in theirs]
            before, after = _learned(twin, block, ours, theirs, steps, rate, seed + i)
            ours = [handed_on(twin.graph_module, block, x, twin.seen, BATCH) for x in ours]
            found.append(Block(block.target.name, before, after))
            tick()
    return twin.freeze(), found


def held_quarter(count: int, most: int | None = None, size: int = 1) -> Tensor:
    """(count,) bool: which examples are held out: a quarter of them, evenly spread, or `most` where
    those are fewer; a multiple of `size`."""
    held = count // HELD if most is None else min(count // HELD, most)
    held = held // size * size
    found = torch.zeros(count, dtype=torch.bool)
    if held:
        found[torch.arange(1, held + 1) * count // held - 1] = True
    return found


def _plain(node: fx.Node, value: Any) -> Any:
    return value


def _learned(
    twin: Trainable, block: Segment, x: Sequence[Tensor], y: Sequence[Tensor], steps: int,
    rate: float, seed: int,
) -> tuple[float, float]:  # fmt: skip
    """Learn the parameters of one block; held-out error before and after."""
    parameters = twin.learned_in(block.nodes)
    power = float(y[0].square().mean()) or 1.0
    first = best = _error(twin, block, x[1], y[1]) / power
    kept = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(parameters, lr=rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(steps, 1))
    for step in range(1, steps + 1):
        index = torch.randperm(len(x[0]), generator=generator)[:BATCH].to(x[0].device)
        out = block.run(twin.graph_module, x[0][index], twin.seen)
        loss = nn.functional.mse_loss(out, y[0][index]) / power
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
        cosine.step()
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            error = _error(twin, block, x[1], y[1]) / power
            if error < best:
                best, kept = error, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)
    return first, best


@torch.no_grad()
def _error(twin: Trainable, block: Segment, x: Tensor, y: Tensor) -> float:
    total = 0.0
    for a, b in zip(torch.split(x, BATCH), torch.split(y, BATCH), strict=True):
        total += float((block.run(twin.graph_module, a, twin.seen) - b).square().sum())
    return total / y.numel()
