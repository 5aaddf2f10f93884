"""The stream: what the windows have become on their way through the network, one block in memory.

    stream = Stream(model, windows)
    for i in stream:                       # blocks in order
        block = stream.load(i)             # weights of this block, and of no other
        stats = stream.stats(i, block)     # one Hessian per distinct input
        ...                                # put other weights into `block`: later blocks see them
        stream.advance(i, block)
    stream.outputs()                       # what the head is given

Memory is the hidden states (4 bytes x windows x length x width), one block with its activations
for `batch` windows, and that block's Hessians: constant in the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lighten.model import Model
from lighten.types import Layer, Stats


class Passage(nn.Module):
    """Stands where a block stood: hands the hidden states on and remembers how it was called."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.given: Tensor | None = None  # what to hand on instead of what comes in
        self.as_tuple = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask a block for its attention type and the like
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.call = ((hidden, *args), kwargs)
        out = hidden if self.given is None else self.given
        return (out,) if self.as_tuple else out


class Stream:
    """Hidden states of windows (count, length) of token ids, moved block by block.

    hidden: (count, length, width) float32, the input of the next block. weights: state-dict name
    -> (out, in), instead of what is on disk.
    """

    def __init__(
        self,
        model: Model,
        windows: Tensor,
        *,
        weights: Mapping[str, Tensor] | None = None,
        device: torch.device | str = "cpu",
        batch: int = 4,
    ) -> None:
        self.model, self.windows, self.device, self.batch = model, windows, device, batch
        self.weights = weights or {}
        self.module = model.skeleton()
        model.fill(self.module, skip=model.blocks, device=device, overrides=self.weights)
        self.passages = _insert_passages(self.module, model.blocks)
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._tuples = False
        self.hidden = torch.cat([self._enter(ids) for ids in _split(windows, batch)])

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.passages)))

    def __len__(self) -> int:
        return len(self.passages)

    @torch.no_grad()
    def _enter(self, ids: Tensor) -> Tensor:
        """Embed some windows; the first time, note how every block is called for so many."""
        for passage in self.passages:
            passage.given = None
        self._base(ids)
        if len(ids) not in self._calls:
            self._calls[len(ids)] = [(p.call[0][1:], p.call[1]) for p in self.passages if p.call]
        first = self.passages[0].call
        assert first is not None
        hidden: Tensor = first[0][0]
        for passage in self.passages:
            passage.call = None
        return hidden.detach().float().cpu()

    def _base(self, ids: Tensor) -> Tensor:
        """What the head is given (batch, length, width), passages in the place of blocks."""
        base = getattr(self.module, "base_model", self.module)
        out = base(input_ids=ids.to(self.device), use_cache=False)
        last: Tensor = out.last_hidden_state
        return last

    def load(self, index: int, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The module of a block, its weights from disk, from `weights` or the stream's own."""
        block = self.passages[index].block
        overrides = self.weights if weights is None else {**self.weights, **weights}
        self.model.fill(block, self.model.blocks[index], device=self.device, overrides=overrides)
        return block

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """The output of a block for some of the windows (<= batch, length, width)."""
        args, kwargs = self._calls[len(hidden)][index]
        out = block(hidden, *args, **kwargs)
        moved: Tensor = out[0] if isinstance(out, tuple) else out
        return moved

    def batches(self) -> Iterator[tuple[slice, Tensor]]:
        """(which windows, their hidden states on the device)."""
        for start in range(0, len(self.hidden), self.batch):
            which = slice(start, min(start + self.batch, len(self.hidden)))
            yield which, self.hidden[which].to(self.device)

    @torch.no_grad()
    def advance(self, index: int, block: nn.Module, release: bool = True) -> None:
        """Move every window through the block; then give the block's memory back."""
        for which, hidden in self.batches():
            self.hidden[which] = self.run(index, block, hidden).float().cpu()
        if release:
            self.model.empty(block)

    @torch.no_grad()
    def stats(self, index: int, block: nn.Module) -> dict[str, Stats]:
        """The statistics of each distinct input of the block's layers: `Layer.shares` -> Stats."""
        prefix = self.model.blocks[index]
        layers = [layer for layer in self.model.layers if layer.block == index]
        with hessians(block, prefix, layers) as sums:
            for _, hidden in self.batches():
                self.run(index, block, hidden)
        return {key: total.stats() for key, total in sums.items()}

    def through(self, tick: Callable[[], None] = lambda: None) -> Stream:
        """Move through all blocks that are left, as they are."""
        for index in self:
            self.advance(index, self.load(index))
            tick()
        return self

    def tail(self, which: slice, hidden: Tensor) -> Tensor:
        """What the head is given for windows whose hidden states leave the last block."""
        for passage in self.passages:
            passage.given = hidden
        return self._base(self.windows[which])

    @torch.no_grad()
    def outputs(self) -> Iterator[Tensor]:
        """What the head is given, window by window: (length, width) float32."""
        for which, hidden in self.batches():
            yield from self.tail(which, hidden).float()

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """The head's weight (vocabulary, width) and bias, as the stream computes with them."""
        head = self.module.get_output_embeddings()  # type: ignore[operator]
        return head.weight.detach(), None if head.bias is None else head.bias.detach()


def _split(windows: Tensor, batch: int) -> list[Tensor]:
    return [windows[i : i + batch] for i in range(0, len(windows), batch)]


def _insert_passages(module: nn.Module, blocks: tuple[str, ...]) -> list[Passage]:
    parent, _, _ = blocks[0].rpartition(".")
    siblings = module.get_submodule(parent)
    passages = []
    for i, name in enumerate(blocks):
        passage = Passage(module.get_submodule(name))
        siblings[i] = passage  # type: ignore[operator]
        passages.append(passage)
    return passages


class Moment:
    """X Xᵀ summed over positions; only panels on and above the diagonal are computed."""

    PANEL = 384

    def __init__(self, blocks: tuple[int, ...] = ()) -> None:
        self.n = 0
        self.sum: Tensor | None = None
        self.blocks = blocks
        self.peaks: dict[int, Tensor] = {}

    def add(self, x: Tensor) -> None:
        """x: (..., in)."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        width = x.shape[1]
        if self.sum is None:
            self.sum = torch.zeros(width, width, device=x.device)
        self.n += x.shape[0]
        for block in self.blocks:
            if width % block == 0:
                peak = x.abs().view(-1, width // block, block).amax(-1).square_().sum(0)
                self.peaks[block] = self.peaks.get(block, torch.zeros_like(peak)) + peak
        for i in range(0, width, self.PANEL):
            rows = slice(i, min(i + self.PANEL, width))
            self.sum[rows, i:].addmm_(x[:, rows].T, x[:, i:])

    def stats(self) -> Stats:
        assert self.sum is not None
        upper = self.sum.triu_() / max(self.n, 1)
        hessian = upper + upper.triu(1).T
        self.sum = None
        peaks = {block: peak / max(self.n, 1) for block, peak in self.peaks.items()}
        return Stats(self.n, hessian, peaks=peaks or None)


@contextmanager
def hessians(
    block: nn.Module, prefix: str, layers: list[Layer], blocks: tuple[int, ...] = ()
) -> Iterator[dict[str, Moment]]:
    """While open, sums the inputs of the layers of `block`: one Moment per distinct input.

    blocks: sizes of blocks of inputs whose peaks are wanted (Stats.peaks).
    """
    sums: dict[str, Moment] = {}
    handles = []
    for layer in layers:
        if layer.shares in sums:
            continue
        total = sums[layer.shares] = Moment(blocks)
        module = block.get_submodule(submodule(layer.name, prefix))
        handles.append(
            module.register_forward_pre_hook(lambda _, args, total=total: total.add(args[0]))
        )
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def submodule(parameter: str, prefix: str) -> str:
    """The module of a parameter, as named from `prefix`: ("a.b.c.weight", "a.b") -> "c"."""
    return parameter.removeprefix(f"{prefix}.").rpartition(".")[0]
