"""Soft logits: the gradient that is taken on the way is that of the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lighten.losses import logits
from lighten.losses.logits import Logits
from lighten.seen import Seen


def definition(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    log_p, log_q = (t / temperature).log_softmax(-1), (s / temperature).log_softmax(-1)
    seen = t > -math.inf
    terms = torch.where(seen, log_p.exp() * (log_p - log_q).where(seen, torch.zeros(())), 0.0)
    return temperature**2 * terms.sum(-1).mean()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cached", [2**19, 2 * 11, 1])
def test_value_and_gradient(
    monkeypatch: pytest.MonkeyPatch, cached: int, temperature: float, masked: bool
) -> None:
    monkeypatch.setattr(logits, "CACHED", cached)  # all rows, two at a time, one at a time
    generator = torch.Generator().manual_seed(0)
    s = (3 * torch.randn(5, 11, generator=generator)).requires_grad_()
    t = 3 * torch.randn(5, 11, generator=generator)
    if masked:
        t[:, 2] = -math.inf
    loss = Logits(temperature)(Seen(s), Seen(t))
    (found,) = torch.autograd.grad(2 * loss, s)
    expected = definition(s, t, temperature)
    assert torch.allclose(loss, expected)
    assert torch.allclose(found, torch.autograd.grad(2 * expected, s)[0], atol=1e-7)


def test_a_class_that_both_have_masked_learns_nothing() -> None:
    s, t = torch.randn(4, 6), torch.randn(4, 6)
    s[:, 1] = t[:, 1] = -math.inf
    s.requires_grad_()
    (found,) = torch.autograd.grad(Logits()(Seen(s), Seen(t)), s)
    assert torch.isfinite(found).all()
    assert not found[:, 1].any()


def test_a_teacher_that_learns_too_gets_its_gradient() -> None:
    s, t = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    found = torch.autograd.grad(Logits()(Seen(s), Seen(t)), [s, t])
    assert all(each.any() for each in found)
    (fixed,) = torch.autograd.grad(Logits()(Seen(s), Seen(t.detach())), s)
    assert torch.allclose(found[0], fixed, atol=1e-7)
