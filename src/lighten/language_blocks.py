"""Learned scales of a language model block by block: each block's output against the original's.

A block gets the inputs that the compressed model gives it, as learned so far, and is moved towards
what the original has behind that block, so it also takes back what blocks before it have lost.
What counts is the cost of the error to the whole model (lighten.block_metric). Some of the windows
are not learned from; a block keeps the state that does best there, the given one included.
The head, which is in no block, comes last (lighten.language_head).

In memory: one block with what learns of it, and the hidden states of windows: HEAD_WINDOWS of the
original, WINDOWS of the compressed model.

    recover/blocks/fisher-<i>.safetensors      the metric behind block i, fisher-in: before block 0
    recover/blocks/<i>.safetensors             what block i learned, and its errors
    recover/blocks/head.safetensors            the head's codes and scales, and its errors

*Source:* Li et al. 2021 (BRECQ, arXiv 2102.05426), algorithm 1, with a full Fisher matrix per
block; Chen et al. 2024 (EfficientQAT, arXiv 2407.11062), section 3.2: all parameters of a block,
with straight-through rounding.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lighten.allocator import kept_memory
from lighten.block_metric import Metric, fishers
from lighten.blockwise import held_quarter
from lighten.calibrate import Stream
from lighten.devices import best_precision
from lighten.language_head import learn_head
from lighten.language_student import attach
from lighten.learned_blocks import FACTS, HEAD, LearnedBlocks, is_head, parts_of, vectors_of
from lighten.learned_weight import LearnedVector, LearnedWeight, learnable
from lighten.model import Model
from lighten.progress import stage
from lighten.run import Run
from lighten.solve import Dense
from lighten.types import Compressed, Layer

CHECKS = 3
"""Times that a block is judged on held-out windows, beside the state that it begins with."""

LEAST = 4
"""Windows without which there is none to hold out."""

WINDOWS, JUDGED = 320, 16
"""That blocks learn from and are judged by, at most, and how many of these judge."""

HEAD_WINDOWS, STATES = 448, 2**29
"""The same for the head, at most, where hidden states of so many are not more numbers (2 GB)."""

FISHER_WINDOWS = 16
"""That the cost of errors is taken from, at most."""

TOKENS = 1024
"""In a step."""

ROUGH = 1e-4
"""Nats per token that bfloat16 may cost behind a block for text to be moved through it so."""

RATES = {"row": 2e-4, "vector": 2e-4, "theta": 5e-5, "offset": 5e-3}
"""Of rows and vectors, of the grid's entries (shares of their magnitude), of codes (steps)."""


@dataclass(frozen=True)
class Learning:
    """How blocks learn. mode: see LearnedWeight. vectors: norms and biases learn as well."""

    steps: int
    mode: str = "scales"
    vectors: bool = True
    seed: int = 0
    rate: float = 1.0

    def given(self) -> dict[str, Any]:
        """What a stored block depends on."""
        return {
            "steps": self.steps, "mode": self.mode, "vectors": self.vectors, "seed": self.seed,
            "rate": self.rate, "rates": RATES, "windows": [WINDOWS, JUDGED, HEAD_WINDOWS],
        }  # fmt: skip


def learn_language_blocks(
    run: Run, model: Model, weights: Mapping[str, Compressed], text: Tensor, how: Learning,
    folder: str, device: torch.device | str = "cpu",
) -> LearnedBlocks:  # fmt: skip
    """Every block learned for `how.steps` steps. text: at least LEAST windows (count, length).

    Stored below `folder`; the same call goes on at the block where it stopped, to the same result.
    """
    few = min(len(text), WINDOWS)
    size = min(max(1, TOKENS // text.shape[1]), max(1, few // LEAST), JUDGED)
    head = next(la for la in model.layers if is_head(la))
    most = max(WINDOWS, min(HEAD_WINDOWS, STATES // (text.shape[1] * head.shape[1])))
    text = text[: min(len(text), most) // size * size]
    count = few // size * size
    places = [*range(len(model.blocks)), HEAD]
    given = how.given()
    if not all(run.whole(f"{folder}/{at}.safetensors", given=given) for at in places):
        _fishers(run, model, text[: min(FISHER_WINDOWS, count)], folder, how.seed, device)
        with kept_memory():
            theirs = _blocks(run, model, weights, text, count, how, folder, device, size)
        # what the head notes of each slice stays, and between that no kept memory would fit again
        run.tensors(
            f"{folder}/{HEAD}", lambda: _head(run, theirs, weights, head, how, folder), given=given
        )
    return LearnedBlocks.of(run, model, weights, folder, given)


def _blocks(
    run: Run, model: Model, weights: Mapping[str, Compressed], text: Tensor, count: int,
    how: Learning, folder: str, device: torch.device | str, size: int,
) -> Stream:  # fmt: skip
    """Every block learned from the first `count` windows and stored; the original's stream of all
    windows behind its last block."""
    outside = [la.name for la in model.layers if la.block is None and la.name in weights]
    theirs = Stream(model, text, device=device, batch=4 * size)  # it only moves on: wider is faster
    ours = Stream(model, text[:count], weights=Dense(weights, outside), device=device, batch=size)
    with stage("learn blocks", len(ours), "blocks") as tick:
        for index in ours:
            names = [la.name for la in model.layers if la.block == index and la.name in weights]
            metric = Metric.of(run.tensors(_fisher(folder, index), dict)["fisher"])
            _advance(theirs, index, theirs.load(index), metric)

            def learn(
                index: int = index, names: list[str] = names, metric: Metric = metric
            ) -> dict[str, Tensor]:
                target = theirs.hidden[: len(ours.hidden)]
                return _learned(ours, index, target, weights, names, metric, how)

            found = run.tensors(f"{folder}/{index}", learn, given=how.given())
            dense = vectors_of(found)
            for name in names:
                old = weights[name]
                parts = parts_of(found, name)
                new = Compressed(old.spec, old.shape, old.format, parts) if parts else old
                dense[name] = new.dense()
            _advance(ours, index, ours.load(index, dense), metric)
            tick()
    return theirs


@torch.no_grad()
def _advance(stream: Stream, index: int, block: nn.Module, metric: Metric) -> None:
    """Move all windows through a block, by products in bfloat16 where that is fast and its error,
    which some windows tell, costs next to nothing. Where single channels grow very large it does
    not."""
    device = torch.device(stream.device)
    halves = best_precision("auto", device.type) == "bf16-mixed"
    if halves:
        some = stream.hidden[: stream.batch].to(device)
        whole = stream.run(index, block, some)
        with torch.autocast(device.type, torch.bfloat16):
            error = stream.run(index, block, some).float() - whole
        halves = float(metric(error)) <= ROUGH
    with torch.autocast(device.type, torch.bfloat16, halves):
        stream.advance(index, block)


def _fishers(
    run: Run, model: Model, text: Tensor, folder: str, seed: int, device: torch.device | str
) -> None:
    """Store F behind every block and before the first, unless all are stored."""
    count = len(model.blocks)
    if all(run.whole(f"{_fisher(folder, i)}.safetensors") for i in range(-1, count)):
        return
    with stage("what errors cost", 2 * count, "blocks") as tick:
        for index, found in fishers(Stream(model, text, device=device, batch=2), seed, tick):
            key = _fisher(folder, index)
            run.tensors(key, lambda found=found: {"fisher": found})  # type: ignore[misc]


def _fisher(folder: str, index: int) -> str:
    return f"{folder}/fisher-{'in' if index < 0 else index}"


def _head(
    run: Run, theirs: Stream, weights: Mapping[str, Compressed], head: Layer, how: Learning,
    folder: str,
) -> dict[str, Tensor]:  # fmt: skip
    """What the head learned, stored as of a block; nothing where codes may not move, or the format
    ties those of neighbours."""
    weight = weights.get(head.name)
    if how.mode != "all" or not weight or not learnable(weight) or weight.format.step != 1:
        return {}
    both = head.kind == "embedding+head"
    fisher = run.tensors(_fisher(folder, -1), dict)["fisher"] if both else None
    new, facts = learn_head(theirs, weight, fisher)
    found = {f"part.{key}@{head.name}": part for key, part in new.parts.items()}
    return found | {key: torch.tensor(facts[key]) for key in FACTS}


def _learned(
    stream: Stream, index: int, target: Tensor, weights: Mapping[str, Compressed],
    names: list[str], metric: Metric, how: Learning,
) -> dict[str, Tensor]:  # fmt: skip
    """What one block learned, as it is stored: parts of weights, vectors, errors."""
    block = stream.load(index, Dense(weights, names))
    trained = _attach(stream, index, block, weights, names, how)
    parameters = [
        (p, RATES[key.split(".")[0]] * how.rate)
        for each in trained.values()
        for key, p in each.named_parameters()
    ]
    began = time.monotonic()
    before, after = _descend(stream, index, block, target, parameters, metric, how)
    facts = before, after, time.monotonic() - began
    found = {key: torch.tensor(value) for key, value in zip(FACTS, facts, strict=True)}
    for name, each in trained.items():
        if isinstance(each, LearnedWeight):
            parts = each.freeze().parts
            found |= {f"part.{key}@{name}": part for key, part in parts.items()}
        elif isinstance(each, LearnedVector):
            found[f"vector@{name}"] = each.freeze()
        path, _, key = name.removeprefix(f"{stream.model.blocks[index]}.").rpartition(".")
        owner = block.get_submodule(path)
        parametrize.remove_parametrizations(owner, key)
    return found


def _attach(
    stream: Stream, index: int, block: nn.Module, weights: Mapping[str, Compressed],
    names: list[str], how: Learning,
) -> dict[str, nn.Module]:  # fmt: skip
    """Parametrize what learns of a block, by its name in the model."""
    prefix, model = stream.model.blocks[index], stream.model
    layers = {layer.name: layer for layer in model.layers}
    trained: dict[str, nn.Module] = {}
    if how.vectors:
        for name, p in block.named_parameters():
            if p.dim() == 1:
                trained[f"{prefix}.{name}"] = LearnedVector(p)
    for name in names:
        weight = weights[name]
        if learnable(weight):
            original = model.weight(layers[name]) if how.mode == "all" else None
            made = LearnedWeight(weight, how.mode, original, layers[name].transposed)
            trained[name] = made.to(stream.device)
    for name, each in trained.items():
        attach(block, name.removeprefix(f"{prefix}."), each)
    return trained


def _descend(
    stream: Stream, index: int, block: nn.Module, target: Tensor,
    parameters: list[tuple[nn.Parameter, float]], metric: Metric, how: Learning,
) -> tuple[float, float]:  # fmt: skip
    """Move the parameters to the best state seen; the error on held-out windows before, after."""
    held = held_quarter(len(target), JUDGED, stream.batch)
    device = torch.device(stream.device)
    halves = best_precision("auto", device.type) == "bf16-mixed"
    x, y = [stream.hidden[~held], stream.hidden[held]], [target[~held], target[held]]

    def cost(inputs: Tensor, wanted: Tensor) -> Tensor:
        # a block's output is judged to many more digits than bfloat16 has, its products need not be
        with torch.autocast(device.type, torch.bfloat16, halves and torch.is_grad_enabled()):
            out = stream.run(index, block, inputs.to(device)).float()
        return metric(out - wanted.to(out))

    @torch.no_grad()
    def error() -> float:
        pairs = zip(*(torch.split(each[1], stream.batch) for each in (x, y)), strict=True)
        found = [float(cost(a, b)) for a, b in pairs]
        return sum(found) / len(found)

    first = best = error()
    if not parameters:
        return first, best
    kept = [p.detach().clone() for p, _ in parameters]
    groups = [{"params": [p], "lr": rate} for p, rate in parameters]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(how.steps, 1))
    generator, order = torch.Generator().manual_seed(how.seed + index), list[int]()
    for step in range(1, how.steps + 1):
        if len(order) < stream.batch:
            order = torch.randperm(len(x[0]), generator=generator).tolist()
        at, order = order[: stream.batch], order[stream.batch :]
        loss = cost(x[0][at], y[0][at])
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
        cosine.step()
        if step == how.steps or step % -(-how.steps // CHECKS) == 0:
            now = error()
            if now < best:  # not so where it is NaN
                best, kept = now, [p.detach().clone() for p, _ in parameters]
    with torch.no_grad():
        for (p, _), value in zip(parameters, kept, strict=True):
            p.copy_(value)
    return first, best
