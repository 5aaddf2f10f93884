"""The teacher's k likeliest classes, all others as one bucket: for large vocabularies.

*Source:* the bucket makes it the KL divergence of a coarser distribution, so it is never more than
that of all classes (log sum inequality; Cover and Thomas 2006, section 2.7).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lighten.errors import BadInput, WrongUse
from lighten.registry import losses
from lighten.seen import Seen, rows, same_logits, within


@losses("topk")
@dataclass(frozen=True)
class TopK:
    """KL divergence over the teacher's k likeliest classes and one bucket of all others.

    k: how many, where the teacher shows all its classes; a stored teacher (Seen.indices) has its
    own k. There is no temperature: the bucket's probability is known at 1 only.
    """

    k: int = 64
    source: ClassVar[str] = "Cover and Thomas 2006 (log sum inequality)"
    needs: ClassVar[frozenset[str]] = frozenset()
    floor: ClassVar[float | None] = 0.0
    taught: ClassVar[bool] = True

    def __post_init__(self) -> None:
        within("topk", "k", self.k, 1, 1e9)

    def __call__(
        self,
        student: Seen,
        teacher: Seen,
        labels: Tensor | None = None,
        parts: nn.Module | None = None,
    ) -> Tensor:
        if teacher.indices is None:
            s, t = same_logits(student, teacher, "topk")
            index = t.topk(min(self.k, t.shape[-1]), -1).indices
            log_p, log_p_rest = _buckets(t, index)
        else:
            s, index = rows(student.outputs), _checked(student.outputs, teacher)
            log_p = rows(teacher.outputs)
            # stored in 16 bits, the k may sum to a little more than 1
            rest = (1 - log_p.exp().sum(-1)).clamp(min=0)
            log_p_rest = rest.log().clamp(min=-1e30)
        log_q, log_q_rest = _buckets(s, index)
        inside = (log_p.exp() * (log_p - log_q)).sum(-1)
        return (inside + log_p_rest.exp() * (log_p_rest - log_q_rest)).mean()


def _buckets(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (rows, k) of the classes in `index`, and (rows,) of all others together."""
    whole = logits.logsumexp(-1, keepdim=True)
    # not 1 - sum: that would be noise where the k have nearly everything
    rest = logits.scatter(-1, index, -1e30).logsumexp(-1)
    inside = (logits.gather(-1, index) - whole).clamp(min=-1e30)
    return inside, (rest - whole.squeeze(-1)).clamp(min=-1e30)


def _checked(outputs: Tensor, teacher: Seen) -> Tensor:
    index = teacher.indices
    if index is None or index.shape != teacher.outputs.shape:
        has = None if index is None else tuple(index.shape)
        raise WrongUse(
            f"a stored teacher has indices {has} and outputs {tuple(teacher.outputs.shape)}",
            "both are (batch, ..., k)",
        )
    if index.shape[:-1] != outputs.shape[:-1]:
        raise WrongUse(
            f"the student's outputs are {tuple(outputs.shape)}, the stored teacher's"
            f" {tuple(index.shape)}",
            "both must be for the same inputs",
        )
    index = rows(index).to(outputs.device, torch.int64)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < outputs.shape[-1]:
        raise BadInput(
            f"the stored teacher names class {int(index.max())}, the student has"
            f" {outputs.shape[-1]}",
            "it was stored for another vocabulary",
        )
    return index
