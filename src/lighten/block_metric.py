"""What an error at the output of a block costs the whole language model, in nats per token.

For a small error e of the hidden states behind a block the KL divergence from the model as it came
grows by ½ E[eᵀ F e], F = E[g gᵀ] the Fisher matrix there: g is the gradient of log p(token), the
token drawn from the model itself. Plain squares would count what a few channels and the first
token carry, which can be a thousand times the rest and matter little.

*Source:* Martens and Grosse 2015 (K-FAC, arXiv 1503.05671), section 2, for one position's states.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lighten.calibrate import Stream
from lighten.sensitivity import StoredInputs, head_gradients

RIDGE = 0.02
"""Of F's diagonal, added to it: F comes from a few thousand tokens."""


@dataclass(frozen=True, eq=False)
class Metric:
    """root: (width, width), lower; F = root rootᵀ."""

    root: Tensor

    @classmethod
    def of(cls, fisher: Tensor) -> Metric:
        """From F (width, width); channels without any gradient cost next to nothing."""
        f = fisher.cpu().double()  # not every device has float64
        diagonal = f.diagonal()
        floor = 1e-6 * float(diagonal.mean()) or 1.0
        root = torch.linalg.cholesky(f + torch.diag(RIDGE * diagonal + floor))
        return cls(root.float().to(fisher.device))

    def __call__(self, error: Tensor) -> Tensor:
        """Nats per token of errors (..., width); differentiable."""
        root = self.root.to(error)
        return (error @ root).square().sum(-1).mean() / 2


def fishers(
    stream: Stream, seed: int = 0, tick: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, Tensor]]:
    """(block, F at its output), the last block first, then (-1, F at the input of the first block).
    `tick` is called 2 x blocks times.

    Memory is one block, and one F; the inputs of all blocks are in a temporary file. The stream
    must be at its beginning, and is used up.
    """
    with tempfile.TemporaryFile(prefix="lighten-") as file:
        inputs = StoredInputs(file)
        for index in stream:
            inputs.put(index, stream.hidden)
            stream.advance(index, stream.load(index))
            tick()
        above, _ = head_gradients(stream, seed)
        for index in reversed(range(len(stream))):
            g = above.reshape(-1, above.shape[-1])
            yield index, g.T @ g / len(g)
            above = _below(stream, index, inputs.get(index, stream.hidden), above)
            tick()
    g = above.reshape(-1, above.shape[-1])
    yield -1, g.T @ g / len(g)


def _below(stream: Stream, index: int, hidden: Tensor, above: Tensor) -> Tensor:
    """The gradient at a block's input from the one at its output; both (windows, length, width)."""
    block = stream.load(index)
    below = torch.empty_like(hidden)
    for start in range(0, len(hidden), stream.batch):
        which = slice(start, start + stream.batch)
        x = hidden[which].to(stream.device).requires_grad_(True)
        out = stream.run(index, block, x)
        (gradient,) = torch.autograd.grad(out, x, above[which].to(out))
        below[which] = gradient.cpu()
    stream.model.empty(block)
    return below
