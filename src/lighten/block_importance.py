"""Which transformer blocks a language model misses least: what it loses without each of them.

Every block is left out alone, on a few windows, and the KL divergence of what comes out is taken:
as much work as half as many runs of the model as it has blocks. To leave out those that cost least
is one choice, to spread them evenly another: which of the two is nearer to the teacher is taken.

*Source:* Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers" (blocks are
left out without harm); Sanh et al. 2019, "DistilBERT", section 3 (every other one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lighten.calibrate import Stream
from lighten.depth import spread
from lighten.divergence import compare
from lighten.measure import head_of
from lighten.model import Model

TOKENS = 512
"""That blocks are judged on."""

STRIDE = 4
"""Of positions that are compared: of neighbours, one says as much as all."""


@dataclass(frozen=True, eq=False)
class Shallow:
    """kept: the blocks that stay. kld: nats at the output without the others, before anything is
    learned. outputs: what the head is given then, for the first window (length, width). how: in
    which way they were chosen."""

    kept: list[int]
    kld: float
    outputs: Tensor
    how: str


class Depths:
    """A model whose blocks can be left out, all in memory, on some windows (count, length)."""

    @torch.no_grad()
    def __init__(self, model: Model, windows: Tensor) -> None:
        self.stream = Stream(model, windows)
        self.blocks = [self.stream.load(i) for i in self.stream]
        self.inputs: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            self.inputs.append(self.stream.hidden.clone())
            self.stream.advance(i, block, release=False)
        self.head = head_of(model, *self.stream.head)
        self.original = list(self.stream.outputs())

    def outputs(self, kept: Sequence[int], first: int = 0) -> list[Tensor]:
        """What the head is given, window by window, where of the blocks from `first` on only
        `kept` are run, those before as they are."""
        self.stream.hidden = self.inputs[first].clone()
        for i in kept:
            if i >= first:
                self.stream.advance(i, self.blocks[i], release=False)
        return list(self.stream.outputs())

    def kld(self, outputs: Sequence[Tensor]) -> float:
        """Mean nats from the whole model."""
        total = 0.0
        for ids, mine, theirs in zip(self.stream.windows, outputs, self.original, strict=True):
            at = slice(0, len(ids) - 1, STRIDE)
            found = compare(mine[at], self.head, theirs[at], self.head, ids[1:][at])
            assert found.kld is not None
            total += float(found.kld.mean())
        return total / len(self.original)

    def without(self, index: int) -> float:
        """What leaving one block out costs, in nats."""
        return self.kld(self.outputs(range(index + 1, len(self.blocks)), index))

    def only(self, kept: list[int], how: str) -> Shallow:
        """The model with these blocks only."""
        outputs = self.outputs(kept)
        return Shallow(kept, self.kld(outputs), outputs[0], how)


def shallowest(
    model: Model, windows: Tensor, layers: int, tick: Callable[[], None] = lambda: None
) -> tuple[Shallow, Shallow]:
    """(the better, the other): of `layers` blocks chosen evenly and by what they cost.

    windows: (count, length) token ids, of which TOKENS are used. tick: called once a block.
    """
    few = windows[: max(1, TOKENS // windows.shape[1])]
    depths = Depths(model, few)
    count = len(depths.blocks)
    costs = []
    for i in range(count):
        costs.append(depths.without(i))
        tick()
    dear = sorted(sorted(range(count), key=lambda i: -costs[i])[:layers])
    even = depths.only(evenly(count, layers), "spread evenly")
    cheap = depths.only(dear, "those whose loss alone costs most")
    return (even, cheap) if even.kld <= cheap.kld else (cheap, even)


def evenly(count: int, layers: int) -> list[int]:
    """`layers` of `count` blocks, the first and the last among them where there are two.

    >>> evenly(5, 3), evenly(4, 2), evenly(4, 1)
    ([0, 2, 4], [0, 3], [0])
    """
    return [0] if layers == 1 else spread(count, set(range(count)), layers / count)
