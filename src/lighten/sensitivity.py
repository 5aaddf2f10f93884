"""How much the network minds an error in each weight: one forward and one backward pass.

For a small change of a layer's outputs y the KL divergence from the network as it was grows by
½ E[δyᵀ F δy], F = E[g gᵀ] the Fisher matrix and g the gradient of log p(token) with respect to y,
the token drawn from the network itself. With F's diagonal, an error Δw in the rows of a weight
costs ½ Σ_o F_oo Δw_o H Δw_oᵀ nats per token: first order, no labels, no sum of it measured.

The backward pass goes block by block like the forward pass: each block is run again from its
stored input, so memory is one block, plus the inputs of all blocks for a few windows (in a
temporary file). *Source:* Martens and Grosse 2015 (K-FAC), section 3, with a diagonal F.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lighten.calibrate import Moment, Stream, hessians, submodule
from lighten.types import Layer, Stats

_SLICE = 16_000_000  # bytes of logits in flight
PEAKS = (32, 256)
"""Blocks of inputs whose peaks are noted: those that llama.cpp rounds with one scale."""


def sensitivities(
    stream: Stream, seed: int = 0, tick: Callable[[], None] = lambda: None
) -> Iterator[tuple[Layer, Stats]]:
    """Every layer with its Stats: hessian, gradient (out,), and frequency for embeddings.

    Layers outside the blocks come last. `tick` is called 2 x blocks + 1 times. The stream must be
    at its beginning, and is used up.
    """
    layers = stream.model.layers
    with tempfile.TemporaryFile(prefix="lighten-") as file:
        inputs = StoredInputs(file)
        for index in stream:
            inputs.put(index, stream.hidden)
            stream.advance(index, stream.load(index))
            tick()
        above, outer = head_gradients(stream, seed)
        tick()
        for index in reversed(range(len(stream))):
            block = stream.load(index)
            mine = [layer for layer in layers if layer.block == index]
            hidden = inputs.get(index, stream.hidden)
            above, found = _block(stream, index, block, mine, hidden, above)
            stream.model.empty(block)
            yield from found
            tick()
    yield from _outside(stream, layers, outer, above)


class StoredInputs:
    """The hidden states at the input of each block, in a temporary file; one block in memory."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def put(self, index: int, hidden: Tensor) -> None:
        data = hidden.contiguous().numpy()
        self.file.seek(index * data.nbytes)
        self.file.write(data.data)

    def get(self, index: int, like: Tensor) -> Tensor:
        data = np.empty(like.shape, np.float32)
        self.file.seek(index * data.nbytes)
        self.file.readinto(data.data)
        return torch.from_numpy(data)


def head_gradients(stream: Stream, seed: int) -> tuple[Tensor, tuple[Tensor, Stats]]:
    """The gradient (windows, length, width) at the last block's output, and the head's own Stats.

    Of the tokens' distribution p the head's outputs have F = diag(p) - p pᵀ exactly.
    """
    weight, bias = stream.head
    generator = torch.Generator(weight.device).manual_seed(seed)
    spread = torch.zeros(weight.shape[0], device=weight.device)
    inputs, n = Moment(PEAKS), 0
    above = torch.empty_like(stream.hidden)
    rows = max(1, _SLICE // (4 * weight.shape[0]))
    for which, batch in stream.batches():
        hidden = batch.requires_grad_(True)
        last = stream.tail(which, hidden)
        flat = last.detach().reshape(-1, last.shape[-1])
        inputs.add(flat)
        n += flat.shape[0]
        pull = torch.empty_like(flat)
        for start in range(0, flat.shape[0], rows):
            span = slice(start, start + rows)
            p = torch.nn.functional.linear(flat[span], weight, bias).softmax(-1)
            spread += (p * (1 - p)).sum(0)
            drawn = torch.multinomial(p, 1, generator=generator)
            p.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=p.dtype))
            pull[span] = p @ weight
        last.backward(pull.view_as(last))  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        above[which] = hidden.grad.cpu()
    for passage in stream.passages:
        passage.given = None
    return above, (spread / n, inputs.stats())


def _block(
    stream: Stream,
    index: int,
    block: nn.Module,
    layers: list[Layer],
    hidden: Tensor,
    above: Tensor,
) -> tuple[Tensor, list[tuple[Layer, Stats]]]:
    """Back through one block: the gradient at its input, and its layers' Stats."""
    prefix = stream.model.blocks[index]
    squares: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    handles = []

    def watch(name: str, out: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            g = gradient.reshape(-1, gradient.shape[-1]).float()
            squares[name] = squares.get(name, torch.zeros_like(g[0])) + g.square().sum(0)
            counts[name] = counts.get(name, 0) + g.shape[0]

        out.register_hook(add)  # type: ignore[no-untyped-call]

    for layer in layers:
        module = block.get_submodule(submodule(layer.name, prefix))
        handles.append(
            module.register_forward_hook(
                lambda _module, _args, out, name=layer.name: watch(name, out)
            )
        )
    below = torch.empty_like(hidden)
    with hessians(block, prefix, layers, PEAKS) as sums:
        for start in range(0, len(hidden), stream.batch):
            which = slice(start, start + stream.batch)
            x = hidden[which].to(stream.device).requires_grad_(True)
            out = stream.run(index, block, x)
            out.backward(above[which].to(out))  # type: ignore[no-untyped-call]
            assert x.grad is not None
            below[which] = x.grad.cpu()
    for handle in handles:
        handle.remove()
    found = []
    stats = {key: total.stats() for key, total in sums.items()}
    for layer in layers:
        base = stats[layer.shares]
        gradient = squares[layer.name] / counts[layer.name]
        found.append((layer, replace(base, gradient=gradient)))
    return below, found


def _outside(
    stream: Stream, layers: tuple[Layer, ...], outer: tuple[Tensor, Stats], below: Tensor
) -> Iterator[tuple[Layer, Stats]]:
    """Embedding and head, together where they are one weight.

    An embedding's "inputs" are one-hot: an error Δe in row v costs ½ f_v Σ_d G_d Δe_d², f_v the
    share of positions that look it up and G the mean square gradient at the embedding's output.
    """
    spread, head = outer
    ids = stream.windows.reshape(-1)
    minds = below.reshape(-1, below.shape[-1]).square().mean(0)
    scale = getattr(stream.module.get_input_embeddings(), "embed_scale", None)  # type: ignore[operator]
    if scale is not None:  # Gemma multiplies what it looks up
        minds = minds * float(scale) ** 2
    for layer in layers:
        if layer.block is not None:
            continue
        if layer.kind == "positions":
            used = torch.zeros(layer.shape[0])
            used[: stream.windows.shape[1]] = 1 / stream.windows.shape[1]
            yield layer, Stats(ids.numel(), torch.diag(minds), frequency=used)
            continue
        count = torch.bincount(ids.cpu(), minlength=layer.shape[0]).float() / ids.numel()
        if layer.kind == "embedding":
            yield layer, Stats(ids.numel(), torch.diag(minds), frequency=count)
        elif layer.kind == "head":
            yield layer, replace(head, gradient=spread)
        elif layer.kind == "embedding+head":
            # one matrix for both uses: shares of rows add up to 1, H says what all of them cost
            total = spread.sum().cpu()
            share = (spread.cpu() + count) / (total + 1)
            peaks = {block: peak.cpu() * total for block, peak in (head.peaks or {}).items()}
            mixed = total * head.hessian.cpu() + torch.diag(minds)
            yield layer, Stats(head.n, mixed, gradient=share, peaks=peaks)
        else:
            yield layer, head
