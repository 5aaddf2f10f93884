"""What a language model lost: perplexity, KL divergence and agreement, each with its interval.

Logits never exist whole: hidden states meet the head a slice of positions by a slice of vocabulary
at a time, and the sums over the vocabulary are carried along.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from lighten.errors import BadOutput, WrongUse
from lighten.intervals import Array, Estimate, Statistic, bootstrap

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
        z = hidden @ self.weight[start:stop].float().T
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

    exponents are float32, the sums over slices float64.
    """

    def __init__(self, positions: int, device: torch.device) -> None:
        self.top = torch.full((positions,), -math.inf, device=device)
        self.total = torch.zeros(positions, dtype=torch.float64, device=device)
        self.best = torch.zeros(positions, dtype=torch.long, device=device)
        self.target = torch.zeros(positions, device=device)

    def add(self, z: Tensor, start: int, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Take in logits of tokens start...; gives exp(z - top) and the old sum's new factor."""
        high, where = z.max(1)
        self.best = torch.where(high > self.top, where + start, self.best)
        top = torch.maximum(self.top, high)
        factor = (self.top - top).double().exp()
        self.top = top
        e = (z - top[:, None]).exp_()
        self.total = self.total * factor + e.sum(1).double()
        inside = (targets >= start) & (targets < start + z.shape[1])
        at = (targets - start).clamp(0, z.shape[1] - 1)
        self.target = torch.where(inside, z.gather(1, at[:, None])[:, 0], self.target)
        return e, factor

    def log_sum(self) -> Tensor:
        return self.top.double() + self.total.log()

    def nll(self) -> Tensor:
        return self.log_sum() - self.target.double()


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
    cross = torch.zeros(n, dtype=torch.float64, device=h.device)  # Σ exp(z_p - top) (z_p - z_q)
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
            cross = cross * factor + e.mul_(z_r.sub_(z)).sum(1).double()
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


@dataclass(frozen=True)
class Quality:
    """How good a model is on a text, and how far from its reference (None where there is none).

    windows, tokens: how many, tokens being the predicted ones. kld_*: nats. top1: share of
    positions where both hold the same token likeliest. ratio: perplexity over the reference's.
    """

    windows: int
    tokens: int
    perplexity: Estimate
    reference_perplexity: Estimate | None = None
    perplexity_ratio: Estimate | None = None
    kld_mean: Estimate | None = None
    kld_p99: Estimate | None = None
    top1: Estimate | None = None

    def as_dict(self) -> dict[str, int | dict[str, float | None]]:
        """Flat: name -> count, or {"value", "low", "high"}; what was not measured is left out.

        windows, tokens, perplexity, reference_perplexity, perplexity_ratio, mean_kld (nats),
        p99_kld (nats), top1_agreement (share).
        """
        estimates = {
            "perplexity": self.perplexity,
            "reference_perplexity": self.reference_perplexity,
            "perplexity_ratio": self.perplexity_ratio,
            "mean_kld": self.kld_mean,
            "p99_kld": self.kld_p99,
            "top1_agreement": self.top1,
        }
        found = {name: e.as_dict() for name, e in estimates.items() if e is not None}
        return {"windows": self.windows, "tokens": self.tokens, **found}


def quality(
    model_hidden: Iterable[Tensor],
    head: Head,
    reference_hidden: Iterable[Tensor] | None,
    reference_head: Head | None,
    windows: Tensor,
    *,
    bootstrap_seed: int = 0,
    resamples: int = 1000,
    second_half_only: bool = False,
) -> Quality:
    """Quality of a model over windows (count, length) of token ids, one window in memory at a time.

    model_hidden, reference_hidden: final hidden states (length, dim) of each window, in order.
    Position i predicts token i + 1: length - 1 predictions a window. second_half_only: those from
    position length // 2 on, as llama.cpp's perplexity tool counts.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise WrongUse(
            f"windows are {tuple(windows.shape)}, not (count, length)",
            "at least one window of two tokens is needed",
        )
    count, length = windows.shape
    first = length // 2 if second_half_only else 0
    if first >= length - 1:
        raise WrongUse(f"windows of {length} tokens have no second half to predict")
    rows: list[Positions] = []
    theirs: Iterable[Tensor | None] = repeat(None, count)
    if reference_hidden is not None:
        theirs = _each(reference_hidden, count, "reference")
    ours = _each(model_hidden, count, "model")
    for window, hidden, states in zip(windows, ours, theirs, strict=True):
        for name, h in (("model", hidden), ("reference", states)):
            if h is not None and (h.ndim != 2 or len(h) != length):
                raise WrongUse(f"the {name} gives {tuple(h.shape)} for a window of {length}")
        at = None if states is None else states[first:-1]
        rows.append(compare(hidden[first:-1], head, at, reference_head, window[first + 1 :]))
    return _summary(rows, resamples, bootstrap_seed)


def _each(states: Iterable[Tensor], count: int, name: str) -> Iterator[Tensor]:
    """The states, exactly `count` of them."""
    given = 0
    for given, h in enumerate(states, 1):
        if given > count:
            break
        yield h
    if given != count:
        more = "more" if given > count else f"{given}"
        raise WrongUse(f"the {name} gives hidden states of {more} windows, there are {count}")


def _summary(rows: Sequence[Positions], resamples: int, seed: int) -> Quality:
    """Means and quantiles over windows, all intervals from the same draws."""

    def stack(column: Iterable[Tensor | None]) -> Array:
        return np.stack([c.cpu().double().numpy() for c in column if c is not None])

    nll = stack(row.nll for row in rows)
    surprise = nll.mean(1)
    statistics: dict[str, Statistic] = {"perplexity": lambda i: _exp(surprise[i].mean())}
    if rows[0].kld is not None:
        reference = stack(row.reference_nll for row in rows).mean(1)
        kld = stack(row.kld for row in rows)
        same = stack(row.same_top1 for row in rows).mean(1)
        means = kld.mean(1)
        statistics |= {
            "reference_perplexity": lambda i: _exp(reference[i].mean()),
            "perplexity_ratio": lambda i: _exp((surprise[i] - reference[i]).mean()),
            "kld_mean": lambda i: means[i].mean(),
            "kld_p99": lambda i: np.quantile(kld[i], 0.99),
            "top1": lambda i: same[i].mean(),
        }
    found = bootstrap(statistics, len(rows), resamples=resamples, seed=seed)
    return Quality(len(rows), nll.size, **found)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
