"""Embedding, head and the last norm of a language model learn, which are in no block.

The head is taught by the original's logits, on the hidden states that the compressed blocks leave;
an embedding by what its error costs at the input of the first block (lighten.block_metric). Where
both are one matrix, which may hold a third of a small model's bytes, it learns from the sum. Codes
stay: those of rare tokens would follow noise.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lighten.block_metric import Metric
from lighten.blockwise import held_quarter
from lighten.calibrate import Stream
from lighten.descent import descend
from lighten.devices import best_precision
from lighten.language_student import attach
from lighten.learned_weight import LearnedVector, LearnedWeight, learnable
from lighten.lesson import Lesson
from lighten.measure import head_of
from lighten.seen import Seen
from lighten.sliced_lesson import SlicedLesson
from lighten.types import Compressed, Layer

HELD_OUT = 8
"""Windows by which states are judged, at most."""

RATES = {"row": 1e-3, "vector": 2e-4, "theta": 3e-4}
"""Of rows, of the last norm, of the grid's entries: shares of their magnitude."""


def learn_ends(
    ours: Stream, theirs: Stream, weights: Mapping[str, Compressed], fisher: Tensor, *,
    steps: int, vectors: bool, seed: int, rate: float = 1.0,
) -> dict[str, Tensor]:  # fmt: skip
    """What was learned, as it is stored: part.<part>@<name>, vector@<name>, before, after, seconds.

    ours, theirs: behind their last blocks. fisher: F at the input of the first block.
    """
    began, ends = time.monotonic(), _Ends(ours, theirs, weights, fisher, vectors)
    held = held_quarter(len(ours.hidden))
    judges = held.nonzero().flatten().tolist()[:HELD_OUT]
    rows = (~held).nonzero().flatten().tolist()

    @torch.no_grad()
    def error() -> float:
        parts = [judges[i : i + ours.batch] for i in range(0, len(judges), ours.batch)]
        return sum(float(ends.cost(part)) * len(part) for part in parts) / len(judges)

    parameters = [
        (p, RATES[key.split(".")[0]] * rate)
        for each in ends.trained.values()
        for key, p in each.named_parameters()
    ]
    before, after = descend(
        parameters, lambda at: ends.cost([rows[i] for i in at]), error, count=len(rows),
        batch=ours.batch, steps=steps, seed=seed,
    )  # fmt: skip
    facts = {"before": before, "after": after, "seconds": time.monotonic() - began}
    return ends.stored() | {key: torch.tensor(value) for key, value in facts.items()}


class _Ends:
    """The parts of a model around its blocks, those that learn parametrized."""

    def __init__(
        self, ours: Stream, theirs: Stream, weights: Mapping[str, Compressed], fisher: Tensor,
        vectors: bool,
    ) -> None:  # fmt: skip
        self.ours, self.theirs, self.metric = ours, theirs, Metric.of(fisher)
        model = ours.model
        layers = [la for la in model.layers if la.block is None and la.kind != "positions"]
        self.learned = {
            la.name: LearnedWeight(weights[la.name]).to(ours.device)
            for la in layers
            if la.name in weights and learnable(weights[la.name])
        }
        self.vectors: dict[str, LearnedVector] = {}
        if vectors:
            inside = tuple(f"{block}." for block in model.blocks)
            found = [(n, p) for n, p in model.skeleton().named_parameters() if p.dim() == 1]
            for name in (n for n, _ in found if not n.startswith(inside)):
                vector = LearnedVector(ours.module.get_parameter(name))
                attach(ours.module, name, vector)
                self.vectors[name] = vector
        self.trained: dict[str, nn.Module] = {**self.learned, **self.vectors}
        self.head, self.embedding = _of(layers, "head"), _of(layers, "embedding")
        scale = getattr(ours.module.get_input_embeddings(), "embed_scale", None)  # type: ignore[operator]
        self.scale = 1.0 if scale is None else float(scale)  # Gemma multiplies what it looks up
        like = head_of(model, *theirs.head)
        precision = best_precision("auto", torch.device(ours.device).type)
        self.lesson = SlicedLesson(Lesson.parse("logits:1"), self._head, like, precision)

    def cost(self, windows: list[int]) -> Tensor:
        """Nats per token of these windows; differentiable."""
        with torch.no_grad():
            wanted = self.theirs.tail(windows, self.theirs.hidden[windows].to(self.ours.device))
        found = self.ours.tail(windows, self.ours.hidden[windows].to(self.ours.device))
        self._now = {name: each(each.row) for name, each in self.learned.items()}
        total, _ = self.lesson(Seen(found), Seen(wanted))
        if self.embedding in self._now:
            ids = self.ours.windows[windows].reshape(-1).to(self.ours.device)
            mine = self._now[self.embedding][ids]
            theirs = self.theirs.module.get_input_embeddings().weight[ids]  # type: ignore[operator]
            total = total + self.metric(self.scale * (mine - theirs.detach()))
        return total

    def _head(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.ours.head
        return self._now.get(self.head, weight), bias

    def stored(self) -> dict[str, Tensor]:
        found = {f"vector@{name}": each.freeze() for name, each in self.vectors.items()}
        for name, each in self.learned.items():
            parts = each.freeze().parts
            found |= {f"part.{key}@{name}": part for key, part in parts.items()}
        return found


def _of(layers: list[Layer], what: str) -> str:
    """The name of the layer that is a head, or an embedding, alone or both."""
    return next((layer.name for layer in layers if what in layer.kind.split("+")), "")
