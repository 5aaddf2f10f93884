"""Blocks that keep what their gradients need: as many as memory holds, to the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lighten import kept_activations
from lighten.kept_activations import KeptActivations, free_memory
from lighten.language_student import LanguageStudent, Recomputed
from lighten.model import open_model
from lighten.taught_language_model import TaughtLanguageModel

Tiny = Callable[..., Path]
IDS = torch.arange(48).view(2, 24) % 200 + 5
CPU = torch.device("cpu")


def blocks_of(student: LanguageStudent | TaughtLanguageModel) -> list[Recomputed]:
    return [each for each in student.module.modules() if isinstance(each, Recomputed)]


def runs_of(student: Any, monkeypatch: pytest.MonkeyPatch, free: int | None) -> tuple[int, int]:
    """(blocks that keep, times that a block has run for one gradient), `free` bytes being free."""
    monkeypatch.setattr(kept_activations, "free_memory", lambda device: free)
    ran = list[int]()
    for each in blocks_of(student):
        each.block.register_forward_pre_hook(lambda *_: ran.append(1))
    student(IDS).square().sum().backward()
    kept = blocks_of(student)[0].kept.count
    assert kept is not None
    return kept, len(ran)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_the_same_however_many_keep(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = open_model(tiny(family))
    count, found = len(model.blocks), list[list[torch.Tensor]]()
    for free, kept in ((0, 0), (10**12, count), (None, 0)):
        student = TaughtLanguageModel(model)
        # the first keeps in the first step, whatever it finds: it is the measure
        expected = count if kept else 2 * count - 1
        assert runs_of(student, monkeypatch, free) == (kept, expected)
        found.append([p.grad for p in student.parameters() if p.grad is not None])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_learning_takes_besides_is_left_free(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(tiny("llama"))
    student = TaughtLanguageModel(model)
    learned = 4 * sum(p.numel() for p in student.parameters())
    assert runs_of(student, monkeypatch, 3 * learned)[0] == 0
    assert runs_of(TaughtLanguageModel(model), monkeypatch, 100 * learned)[0] == len(model.blocks)


def test_half_of_the_memory_is_shared_among_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1000, requires_grad=True)  # exp keeps its result, 4,000 bytes
    for free, kept in ((7_999, 0), (8_000, 1), (40_000, 5), (10**9, 8)):
        monkeypatch.setattr(kept_activations, "free_memory", lambda device, free=free: free)
        decided = KeptActivations(8, lambda: 0)
        assert torch.equal(decided.measured(x.exp, CPU), x.exp())
        assert decided.count == kept


def test_a_step_after_the_first_asks_no_more(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    student = LanguageStudent(open_model(tiny("llama")), {})
    assert runs_of(student, monkeypatch, 0)[0] == 0
    monkeypatch.setattr(kept_activations, "free_memory", None)
    student(IDS).square().sum().backward()
    assert blocks_of(student)[0].kept.count == 0


def test_what_is_free() -> None:
    found = free_memory(CPU)
    assert found is None or found > 2**20
    assert free_memory(torch.device("meta")) is None
