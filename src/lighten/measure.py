"""What a language model lost: perplexity, KL divergence and agreement, each with its interval.

Two models are run over the same windows, block by block, one block of either in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lighten.calibrate import Stream
from lighten.data import load_text
from lighten.data import windows as token_windows
from lighten.divergence import Head, Positions, compare
from lighten.errors import WrongUse
from lighten.intervals import Array, Estimate, Statistic, bootstrap
from lighten.model import Model, open_model
from lighten.progress import stage
from lighten.results import speed

__all__ = ["Head", "Quality", "compare", "head_of", "measure_model", "quality"]


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
    seen: Callable[[Positions], None] = lambda _: None,
) -> Quality:
    """Quality of a model over windows (count, length) of token ids, one window in memory at a time.

    model_hidden, reference_hidden: final hidden states (length, dim) of each window, in order.
    Position i predicts token i + 1: length - 1 predictions a window. second_half_only: those from
    position length // 2 on, as llama.cpp's perplexity tool counts. seen: is given what is known of
    the positions of each window, in order.
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
        seen(rows[-1])
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


def head_of(model: Model, weight: Tensor, bias: Tensor | None) -> Head:
    """The head of a model, with what its config does to the logits afterwards."""
    config = model.config
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
    return Head(weight, bias, softcap, scale / divisor)


def measure_model(
    model: str | Path,
    *,
    against: str | Path | None = None,
    data: str | Path | None = None,
    samples: int = 64,
    length: int = 512,
    seed: int = 0,
    second_half_only: bool = False,
    runtime: bool = True,
) -> dict[str, Any]:
    """Facts about any model file; a quantity is a number or {"value", "low", "high"}.

    {"model", "against", "data", "windows", "tokens", "measured": {...}, "reference": {...},
    "notes"}. measured: bytes, bits_per_weight, the quantities of Quality.as_dict, and for a GGUF
    those of llama.cpp (unless `runtime` is False): load_seconds, prompt_tokens_per_second,
    generate_tokens_per_second, peak_memory_bytes. reference: the same of `against`, if given.
    Raises WrongUse if the two split text differently, BadInput for damaged or too small files.
    """
    opened = open_model(model)
    reference = None if against is None else open_model(against)
    corpus = load_text(data)
    for each in (opened, reference):
        if each is not None:
            fits_context(each, length)
    ids = token_windows(corpus, opened.tokenizer, length, samples, seed)
    if reference is not None:
        theirs = token_windows(corpus, reference.tokenizer, length, 1, seed)
        if not theirs.equal(ids[:1]):
            raise WrongUse(
                f"{against} does not split text into the tokens that {model} does",
                "only models with the same tokenizer can be compared token by token",
            )
    mine = _run(opened, ids)
    other = None if reference is None else _run(reference, ids)
    with stage("predict", len(ids), "windows") as tick:
        found = quality(
            _ticking(mine.outputs(), tick),
            head_of(opened, *mine.head),
            None if other is None else other.outputs(),
            None if other is None else head_of(other.model, *other.head),
            ids,
            bootstrap_seed=seed,
            second_half_only=second_half_only,
        ).as_dict()
    measured: dict[str, Any] = {**_size(opened), **found}
    facts: dict[str, Any] = {
        "model": str(model),
        "against": None if against is None else str(against),
        "data": corpus.source,
        "windows": measured.pop("windows"),
        "tokens": measured.pop("tokens"),
    }
    if reference is not None:
        perplexity = measured.pop("reference_perplexity")
        facts["reference"] = {**_size(reference), "perplexity": perplexity}
        facts["reference"] |= _runtime(reference) if runtime else {}
    facts["measured"] = measured | (_runtime(opened) if runtime else {})
    facts["notes"] = list(opened.notes) + ([] if reference is None else list(reference.notes))
    if corpus.builtin:
        facts["notes"].append("measured on the short text that lighten brings along; give --data")
    return facts


def fits_context(model: Model, length: int, option: str = "--length") -> None:
    """Raise WrongUse where windows of `length` tokens are longer than the model's context.

    option: what the command calls the length of its windows."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise WrongUse(
            f"windows of {length} tokens, but {model.source} takes no more than {limit}",
            f"give {option} {limit} or less",
        )


def _run(model: Model, ids: Tensor) -> Stream:
    with stage(f"run {Path(model.source).name}", len(model.blocks), "blocks") as tick:
        return Stream(model, ids).through(tick)


def _ticking(states: Iterable[Tensor], tick: Callable[[], None]) -> Iterator[Tensor]:
    for h in states:
        yield h
        tick()


def _size(model: Model) -> dict[str, Any]:
    return {"bytes": model.nbytes, "bits_per_weight": 8 * model.nbytes / model.parameters}


def _runtime(model: Model) -> dict[str, Any]:
    """What llama.cpp says of a GGUF file; nothing for a folder."""
    return speed(model.path, model) if model.kind == "gguf" else {}
