"""Windows of text that the best state of a student is chosen by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lighten.divergence import Head, compare
from lighten.language_student import LanguageModel


class Watched:
    """Called with a student, minus its mean KL divergence from the teacher in nats: higher is
    better. In float32.

    windows: (count, length) token ids. like: the teacher's head. own: what the student's head does
    to logits where that is not what the teacher's does.
    """

    measure = "mean_kld"

    @torch.no_grad()
    def __init__(
        self, teacher: LanguageModel, windows: Tensor, like: Head, own: Head | None = None
    ) -> None:
        self.windows, self.like = windows, like
        self.own = like if own is None else own
        device = like.weight.device
        self.original = [teacher(ids[None].to(device))[0] for ids in windows]

    @torch.no_grad()
    def __call__(self, student: Any) -> float:
        """Raises BadOutput where outputs are not finite."""
        weight, bias = student.head()
        head = Head(weight, bias, self.own.softcap, self.own.scale)
        total = 0.0
        for ids, theirs in zip(self.windows, self.original, strict=True):
            mine = student(ids[None].to(weight.device))[0]
            found = compare(mine[:-1], head, theirs[:-1], self.like, ids[1:])
            assert found.kld is not None
            total += float(found.kld.mean())
        return -total / len(self.windows)
