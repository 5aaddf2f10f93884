"""Two language models on the same positions: surprise, KL divergence, agreement.

Logits never exist whole: hidden states meet the head a slice of positions by a slice of vocabulary
at a time, and the sums over the vocabulary are carried along.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lighten.devices import widest
from lighten.errors import BadOutput, WrongUse

_ROWS = 512  # positions in a slice
_LOGITS = 2**20  # logits in a slice: 4 MB, of which about six stand at once
_WEIGHTS = 2**22  # head weights in a slice, as float32: 16 MB


@dataclass(frozen=True, eq=False)
class Head:
    """From hidden states to logits: softcap · tanh(scale · (h Wᵀ + bias) / softcap).

    weight: (vocab, dim), any float type, used as float32. bias: (vocab,). softcap: None for none.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def logits(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Logits (positions, stop - start), float32, of that slice of the vocabulary."""
        return self.after(hidden @ self.weight[start:stop].float().T, start, stop)

    def after(self, z: Tensor, start: int, stop: int) -> Tensor:
        """Logits from the products with the weight of that slice, in their place."""
        if self.bias is not None:
            z += self.bias[start:stop].float()
        if self.scale != 1.0:
            z *= self.scale
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)


@dataclass(frozen=True, eq=False)
class Positions:
    """What is known of each position: tensors (positions,), in nats; None without a reference.

    nll: surprise at the token that came. kld: KL(reference || model). same_top1: whether both hold
    the same token likeliest.
    """

    nll: Tensor
    reference_nll: Tensor | None = None
    kld: Tensor | None = None
    same_top1: Tensor | None = None


class _Sums:
    """What softmax needs, carried over slices of the vocabulary: top logit, Σ exp(z - top), argmax.

    exponents are float32, the sums over slices `widest`.
    """

    def __init__(self, positions: int, device: torch.device) -> None:
        self.wide = widest(device)
        self.top = torch.full((positions,), -math.inf, device=device)
        self.total = torch.zeros(positions, dtype=self.wide, device=device)
        self.best = torch.zeros(positions, dtype=torch.long, device=device)
        self.target = torch.zeros(positions, device=device)

    def add(self, z: Tensor, start: int, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Take in logits of tokens start...; gives exp(z - top) and the old sum's new factor."""
        high, where = z.max(1)
        self.best = torch.where(high > self.top, where + start, self.best)
        top = torch.maximum(self.top, high)
        factor = (self.top - top).to(self.wide).exp()
        self.top = top
        e = (z - top[:, None]).exp_()
        self.total = self.total * factor + e.sum(1)
        inside = (targets >= start) & (targets < start + z.shape[1])
        at = (targets - start).clamp(0, z.shape[1] - 1)
        self.target = torch.where(inside, z.gather(1, at[:, None])[:, 0], self.target)
        return e, factor

    def log_sum(self) -> Tensor:
        return self.top.to(self.wide) + self.total.log()

    def nll(self) -> Tensor:
        return self.log_sum() - self.target


@torch.no_grad()
def compare(
    hidden: Tensor,
    head: Head,
    reference_hidden: Tensor | None,
    reference_head: Head | None,
    targets: Tensor,
) -> Positions:
    """Compare two models position by position; hidden: (positions, dim), targets: (positions,).

    KL(p || q) = Σ p (z_p - z_q) - log Σ exp z_p + log Σ exp z_q, with p the reference. The two may
    have different dims, not different vocabularies. Extra memory below 100 MB whatever the sizes.
    Raises WrongUse if shapes do not fit, BadOutput if a model's outputs are not finite.
    """
    _fit("model", hidden, head, targets)
    if (reference_hidden is None) != (reference_head is None):
        raise WrongUse("a reference needs both hidden states and a head")
    if reference_hidden is not None and reference_head is not None:
        _fit("reference", reference_hidden, reference_head, targets)
        ours, theirs = head.weight.shape[0], reference_head.weight.shape[0]
        if ours != theirs:
            raise WrongUse(
                f"the model has {ours} tokens, its reference {theirs}",
                "only models with the same vocabulary can be compared",
            )
    slices = []
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, start + _ROWS)
        reference = None if reference_hidden is None else reference_hidden[rows]
        slices.append(_compare_rows(hidden[rows], head, reference, reference_head, targets[rows]))
    columns = zip(*slices, strict=True)
    found = Positions(*(None if c[0] is None else torch.cat(c) for c in columns))  # type: ignore[arg-type]
    _finite("model", found.nll)
    if found.reference_nll is not None:
        _finite("reference", found.reference_nll)
    return found


def _compare_rows(
    hidden: Tensor,
    head: Head,
    reference_hidden: Tensor | None,
    reference_head: Head | None,
    targets: Tensor,
) -> tuple[Tensor | None, ...]:
    """The four columns of Positions for a few positions."""
    h, n = hidden.float(), len(targets)
    targets = targets.to(h.device)
    ours, theirs = _Sums(n, h.device), _Sums(n, h.device)
    cross = torch.zeros(n, dtype=ours.wide, device=h.device)  # Σ exp(z_p - top) (z_p - z_q)
    r = None if reference_hidden is None else reference_hidden.to(h.device).float()
    vocabulary = head.weight.shape[0]
    widest = max(w.weight.shape[1] for w in (head, reference_head) if w is not None)
    step = max(1, min(_LOGITS // n, _WEIGHTS // widest))
    for start in range(0, vocabulary, step):
        stop = min(start + step, vocabulary)
        z = head.logits(h, start, stop)
        ours.add(z, start, targets)
        if r is not None and reference_head is not None:
            z_r = reference_head.logits(r, start, stop)
            e, factor = theirs.add(z_r, start, targets)
            cross = cross * factor + e.mul_(z_r.sub_(z)).sum(1)
    if r is None:
        return ours.nll(), None, None, None
    kld = cross / theirs.total - theirs.log_sum() + ours.log_sum()
    # Rounding may take what is zero a hair below; a divergence is never negative.
    return ours.nll(), theirs.nll(), kld.clamp_min(0), ours.best == theirs.best


def _fit(who: str, hidden: Tensor, head: Head, targets: Tensor) -> None:
    if hidden.ndim != 2 or targets.ndim != 1 or len(hidden) != len(targets) or not len(targets):
        raise WrongUse(
            f"hidden states of the {who} are {tuple(hidden.shape)}, targets {tuple(targets.shape)}",
            "give (positions, dim) and (positions,), at least one position",
        )
    vocabulary, dim = head.weight.shape
    if hidden.shape[1] != dim:
        raise WrongUse(f"the {who}'s head takes {dim} channels, its states have {hidden.shape[1]}")
    if int(targets.min()) < 0 or int(targets.max()) >= vocabulary:
        raise WrongUse(
            f"targets reach from {int(targets.min())} to {int(targets.max())}, "
            f"the {who} has {vocabulary} tokens",
            "is this text from another tokenizer?",
        )


def _finite(who: str, nll: Tensor) -> None:
    bad = int((~nll.isfinite()).sum())
    if bad:
        raise BadOutput(f"the {who} gives no finite logits at {bad} of {len(nll)} positions")
