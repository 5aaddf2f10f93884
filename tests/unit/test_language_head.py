"""The head of a language model, row by row: nearer to the original, in the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lighten import language_head
from lighten.block_metric import fishers
from lighten.calibrate import Stream
from lighten.divergence import Head
from lighten.language_head import Embedding, learn_head
from lighten.learned_blocks import is_head
from lighten.model import open_model
from lighten.registry import formats
from lighten.types import Compressed, Spec

Tiny = Callable[..., Path]
ROWS, WIDTH = 24, 32


def rounded(w: Tensor, name: str = "q4_0") -> Compressed:
    format = formats[name]
    grid = format.fit(w)
    parts = format.pack(format.encode(w, grid), grid)
    return Compressed(Spec(format=name), tuple(w.shape), format, parts)  # type: ignore[arg-type]


def text(count: int = 32) -> Tensor:
    return torch.randint(5, 205, (count, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])  # two matrices; one for both
def test_it_comes_nearer_on_windows_that_were_held_out(tiny: Tiny, family: str) -> None:
    model = open_model(tiny(family))
    (layer,) = (la for la in model.layers if is_head(la))
    weight = rounded(model.weight(layer))
    windows = text()
    fisher = dict(fishers(Stream(model, windows, batch=2)))[-1]
    theirs = Stream(model, windows, batch=2).through()
    before = {k: p.clone() for k, p in weight.parts.items()}
    both = layer.kind == "embedding+head"
    found, facts = learn_head(theirs, weight, fisher if both else None)
    assert all(p.equal(before[k]) for k, p in weight.parts.items())  # the given one stays
    assert facts["after"] < facts["before"]
    assert not found.dense().equal(weight.dense())
    assert found.nbytes() == weight.nbytes()


def test_where_nothing_is_known_of_a_row_it_stays() -> None:
    head, _weight, hidden = problem()
    far = head.weight.clone()
    far[3] = 0
    bias = torch.zeros(ROWS)
    bias[3] = -40  # no position gives this token a chance
    found = language_head._moved(hidden, Head(far, bias), rounded(far), None)
    was = rounded(far).dense()
    assert found.dense()[3].equal(was[3])
    assert not found.dense().equal(was)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_gradient_is_that_of_the_divergence(softcap: float | None) -> None:
    head, weight, hidden = problem()
    head = Head(head.weight, None, softcap, 0.7)
    now = weight.dense()
    found = language_head._rows(hidden, head, now).gradient
    # where both are one the gradient is zero; a little away it is curvature times error
    assert language_head._rows(hidden, head, head.weight).gradient.abs().max() < 1e-4
    p = head.logits(hidden, 0, ROWS).softmax(1)
    other = Head(now.requires_grad_(True), None, softcap, 0.7)
    z = hidden @ other.weight.T * 0.7
    z = z if softcap is None else torch.tanh(z / softcap) * softcap
    kld = (p * (p.log() - z.log_softmax(1))).sum()
    (wanted,) = torch.autograd.grad(kld, now)
    near = torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0)
    assert near > (0.9999 if softcap is None else 0.98)  # the cap's slope is the original's


@pytest.mark.parametrize(("precision", "near_enough"), [("32-true", 1e-4), ("bf16-mixed", 1e-2)])
def test_what_far_positions_add_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, precision: str, near_enough: float
) -> None:
    """Each row's mass is split between positions of its own and usual ones, and nothing else."""
    head, weight, hidden = problem()
    monkeypatch.setattr(language_head, "NEAR", 0.02)
    monkeypatch.setattr(language_head, "CACHED", 7 * ROWS)  # seven positions at a time
    monkeypatch.setattr(language_head, "best_precision", lambda *_: precision)
    found = language_head._rows(hidden, head, weight.dense())
    near = torch.stack(
        [found.value[found.start[v] : found.start[v + 1]].sum() for v in range(ROWS)]
    )
    assert torch.allclose(near + found.far, found.mass, rtol=1e-4)
    assert 0 < float(found.far.sum()) < float(found.mass.sum())
    p = head.logits(hidden, 0, ROWS).softmax(1)
    assert torch.allclose(found.mass, (p * (1 - p)).sum(0), rtol=near_enough)
    mine = hidden @ weight.dense().T
    gradient = (mine.softmax(1) - p).T @ hidden
    assert (found.gradient - gradient).norm() < 3 * near_enough * gradient.norm()


def test_a_matrix_that_is_the_embedding_too_minds_what_is_read() -> None:
    """A token that is read a million times is moved by the embedding's error, not the head's."""
    head, weight, hidden = problem()
    fisher = torch.eye(WIDTH)
    count = torch.zeros(ROWS)
    count[5] = 1e6
    found = language_head._moved(hidden, head, weight, Embedding(fisher, (count, count)))
    alone = language_head._moved(hidden, head, weight, None)
    error = (found.dense() - head.weight).square().sum(1)
    assert error[5] <= (weight.dense() - head.weight).square().sum(1)[5]
    assert found.dense()[6].equal(alone.dense()[6])


def problem() -> tuple[Head, Compressed, Tensor]:
    generator = torch.Generator().manual_seed(1)
    w: Any = torch.randn(ROWS, WIDTH, generator=generator)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    hidden = torch.randn(300, WIDTH, generator=generator) @ mix / 2
    return Head(w), rounded(w), hidden
