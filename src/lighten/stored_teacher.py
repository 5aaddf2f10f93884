"""A teacher whose answers are on disk: its k likeliest tokens at every position of some windows.

    teacher/<n>.safetensors     of 16 windows: index (16, length, k), log_p (16, length, k) float16

Worth it where windows are seen more than once: a step then has no teacher to run. What the k do not
hold is one bucket (the loss `topk`). A shard is whole or absent, so a stopped pass goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lighten.divergence import Head
from lighten.errors import BadInput, WrongUse
from lighten.lesson import Term
from lighten.preflight import preflight
from lighten.progress import note, stage
from lighten.run import Run
from lighten.seen import Seen
from lighten.sliced_lesson import LOGITS, logits

SHARD = 16
"""Windows in a file."""


class StoredTeacher:
    """Called with windows (batch, length) that it was filled with, it gives what was stored."""

    def __init__(self, run: Run, windows: Tensor, k: int, vocabulary: int) -> None:
        if not 1 <= k <= vocabulary:
            raise WrongUse(f"{k} likeliest tokens of {vocabulary}", "for example topk:1:k=64")
        self.run, self.windows, self.k, self.vocabulary = run, windows, k, vocabulary
        self.kind = torch.uint16 if vocabulary <= 2**16 else torch.int32
        self.places = {_key(ids): i for i, ids in enumerate(windows)}

    @property
    def nbytes(self) -> int:
        """Bytes on disk when it is filled."""
        return self.windows.numel() * self.k * (self.kind.itemsize + 2)

    def fill(self, teacher: Callable[[Tensor], Tensor], head: Head) -> StoredTeacher:
        """Store what is not stored yet; says the size first. teacher: windows -> hidden states.

        Raises NoRoom before any work where the disk has not that much.
        """
        shards = -(-len(self.windows) // SHARD)
        left = [i for i in range(shards) if not self.run.whole(f"{_name(i)}.safetensors")]
        if left:
            size = self.nbytes * len(left) // shards
            about = f"{len(self.windows)} windows, {self.k} tokens each: {size / 1e6:,.0f} MB"
            note(f"the teacher's answers go to disk ({about})")
            preflight(self.run.folder, disk=size + size // 20)
        with stage("store the teacher", len(left), "files") as tick:
            for i in left:
                windows = self.windows[i * SHARD : (i + 1) * SHARD]
                self.run.tensors(_name(i), lambda w=windows: self._answers(w, teacher, head))  # type: ignore[misc]
                tick()
        return self

    @torch.no_grad()
    def _answers(
        self, windows: Tensor, teacher: Callable[[Tensor], Tensor], head: Head
    ) -> dict[str, Tensor]:
        index, log_p = [], []
        rows = max(1, LOGITS // self.vocabulary)
        for ids in windows:
            for hidden in torch.split(teacher(ids[None])[0], rows):
                found = logits(hidden, head.weight, head.bias, head).log_softmax(-1).topk(self.k)
                index.append(found.indices.to(torch.int32).cpu())
                log_p.append(found.values.half().cpu())
        shape = (*windows.shape, self.k)
        return {
            "index": torch.cat(index).view(shape).to(self.kind),
            "log_p": torch.cat(log_p).view(shape),
        }

    def __call__(self, ids: Tensor) -> Seen:
        """Log-probabilities and indices (batch, length, k), where ids is; raises BadInput."""
        rows = [self._row(window) for window in ids.cpu()]
        index = torch.stack([row[0] for row in rows]).to(ids.device)
        return Seen(torch.stack([row[1] for row in rows]).to(ids.device), indices=index)

    def _row(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        place = self.places.get(_key(ids))
        if place is None:
            raise BadInput(
                "the stored teacher was not asked about this window", "fill it with all windows"
            )
        from safetensors import safe_open

        path = self.run.path(f"{_name(place // SHARD)}.safetensors")
        file: Any
        with safe_open(path, "pt") as file:
            index = file.get_slice("index")[place % SHARD]
            log_p = file.get_slice("log_p")[place % SHARD]
        return index.long(), log_p.float()


def answering(
    run: Run, terms: Iterable[Term], teacher: Callable[[Tensor], Tensor], head: Head,
    windows: Tensor, seen: int,
) -> Any:  # fmt: skip
    """The teacher, or its answers on disk: where `topk` is all that is learned from it, and
    windows are seen again, so that storing is less work than running.

    terms: of the lesson. seen: how many windows are learned from in all.
    """
    taught = [term for term in terms if term.weight and term.loss.taught]
    if [term.name for term in taught] == ["topk"] and seen > len(windows):
        loss: Any = taught[0].loss
        stored, device = StoredTeacher(run, windows, loss.k, len(head.weight)), head.weight.device
        return stored.fill(lambda ids: teacher(ids.to(device)), head)
    return teacher


def _name(shard: int) -> str:
    return f"teacher/{shard}"


def _key(ids: Tensor) -> bytes:
    return ids.to(torch.int64).numpy().tobytes()
