"""Blocks of a language model that learn alone: never worse, the same bytes, resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lighten import allocator, language_blocks
from lighten.block_metric import Metric, fishers
from lighten.calibrate import Stream
from lighten.language_blocks import Learning, learn_language_blocks
from lighten.learned_blocks import is_head
from lighten.model import open_model
from lighten.registry import formats
from lighten.run import Run
from lighten.types import Compressed, Spec

Tiny = Callable[..., Path]
TEXT = torch.arange(8 * 16).view(8, 16) * 7 % 200 + 5


def rounded(model: Any, name: str = "q4_0") -> dict[str, Compressed]:
    """Every layer that the format fits, rounded to nearest."""
    found = {}
    for layer in model.layers:
        w, format = model.weight(layer), formats[name]
        if format.accepts(layer.shape) is None and layer.kind != "positions":
            grid = format.fit(w)
            parts = format.pack(format.encode(w, grid), grid)
            found[layer.name] = Compressed(Spec(format=name), layer.shape, format, parts)
    return found


def codes(weight: Compressed) -> torch.Tensor:
    found: torch.Tensor = weight.format.unpack(weight.parts, weight.shape)[0]
    return found


@pytest.mark.parametrize(
    ("family", "mode"),
    [("llama", "scales"), ("llama", "all"), ("gpt2", "all"), ("gemma3_text", "all")],
)
def test_blocks_learn_in_the_same_bytes(tiny: Tiny, tmp_path: Path, family: str, mode: str) -> None:
    model = open_model(tiny(family))
    weights = rounded(model)
    how = Learning(12, mode, rate=1.0 if mode == "all" else 3.0)
    with Run.open(tmp_path, {}) as run:
        found = learn_language_blocks(run, model, weights, TEXT, how, "blocks")
    outside = [la.name for la in model.layers if is_head(la)]
    head = outside if mode == "all" else []
    assert [row["block"] for row in found.errors] == [*model.blocks, *head]
    assert all(row["after"] <= row["before"] for row in found.errors)
    assert any(row["after"] < row["before"] for row in found.errors)
    assert list(found.weights) == list(weights)
    changed = [n for n in weights if not found.weights[n].dense().equal(weights[n].dense())]
    inside = {layer.name for layer in model.layers if layer.block is not None}
    assert changed
    assert set(changed) <= inside | set(head)
    assert all(found.weights[n].nbytes() == weights[n].nbytes() for n in weights)
    if mode == "scales":
        assert all(codes(found.weights[n]).equal(codes(weights[n])) for n in weights)
    assert found.vectors
    assert all(found.vectors[n].shape == model.tensors[n].load().shape for n in found.vectors)


def test_it_goes_on_at_the_block_where_it_stopped(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(tiny("llama"))
    weights, how = rounded(model), Learning(6, "all")
    learned, seen = language_blocks._learned, list[int]()

    def watched(stream: Any, index: int, *rest: Any) -> Any:
        seen.append(index)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return learned(stream, index, *rest)

    def ask(folder: str) -> language_blocks.LearnedBlocks:
        with Run.open(tmp_path / folder, {}) as run:
            return learn_language_blocks(run, model, weights, TEXT, how, "blocks")

    whole = ask("a")
    monkeypatch.setattr(language_blocks, "_learned", watched)
    with pytest.raises(KeyboardInterrupt):
        ask("b")
    again = ask("b")
    assert seen == [0, 1, *range(1, len(model.blocks))]
    assert all(again.weights[n].dense().equal(whole.weights[n].dense()) for n in weights)
    assert all(again.vectors[n].equal(whole.vectors[n]) for n in whole.vectors)
    monkeypatch.setattr(language_blocks, "Stream", None)  # nothing is run where all is stored
    last = ask("b")
    assert len(seen) == 1 + len(model.blocks)
    assert last.errors == again.errors
    assert all(last.weights[n].dense().equal(whole.weights[n].dense()) for n in weights)


@pytest.mark.parametrize(("states", "windows"), [(2**29, 8), (1, 4)])
def test_the_head_learns_from_more_text_where_memory_allows(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: int, windows: int
) -> None:
    model = open_model(tiny("llama"))
    seen, learn_head, learned = list[int](), language_blocks.learn_head, language_blocks._learned

    def head(theirs: Stream, *rest: Any) -> Any:
        seen.append(len(theirs.hidden))
        assert not allocator._inside  # kept memory would lie between what is noted, 100 MB a slice
        return learn_head(theirs, *rest)

    def block(ours: Stream, index: int, target: torch.Tensor, *rest: Any) -> Any:
        seen.append(len(target))
        assert len(ours.hidden) == len(target)
        return learned(ours, index, target, *rest)

    for name, value in {
        "WINDOWS": 4,
        "STATES": states,
        "learn_head": head,
        "_learned": block,
    }.items():
        monkeypatch.setattr(language_blocks, name, value)
    with Run.open(tmp_path, {}) as run:
        learn_language_blocks(run, model, rounded(model), TEXT, Learning(2, "all"), "blocks")
    assert seen == [4] * len(model.blocks) + [windows]


def test_a_block_that_only_gets_worse_is_left_as_it_was(tiny: Tiny, tmp_path: Path) -> None:
    model = open_model(tiny("llama"))
    weights = rounded(model)
    with Run.open(tmp_path, {}) as run:
        how = Learning(6, "scales", rate=1e4)
        found = learn_language_blocks(run, model, weights, TEXT, how, "blocks")
    assert all(row["after"] == row["before"] for row in found.errors)
    assert all(found.weights[n].dense().equal(weights[n].dense()) for n in weights)
    assert all(v.equal(model.tensors[n].load().float()) for n, v in found.vectors.items())


def test_the_metric_is_the_fisher_form() -> None:
    g = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7)
    fisher, e = g.T @ g / len(g), torch.randn(5, 3, 6)
    exact = torch.einsum("bti,ij,btj->bt", e, fisher, e).mean() / 2
    assert 1 <= float(Metric.of(fisher)(e) / exact) < 1.1
    assert float(Metric.of(fisher)(torch.zeros(2, 6))) == 0


def test_fishers_come_from_the_last_block_to_the_first(tiny: Tiny) -> None:
    model = open_model(tiny("llama"))
    found = list(fishers(Stream(model, TEXT[:4], batch=2)))
    assert [index for index, _ in found] == [*reversed(range(len(model.blocks))), -1]
    for _, f in found:
        assert torch.allclose(f, f.T, atol=1e-6)
        assert float(f.diagonal().min()) > 0


class Way:
    """A stream through one block, which notes in what precision its text was moved."""

    batch, device, halves = 2, "cpu", False

    def __init__(self, size: float) -> None:
        self.hidden = size * torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + block(hidden)
        return out

    def advance(self, index: int, block: nn.Module) -> None:
        self.halves = torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("precision", "size", "halves"),
    [("bf16-mixed", 0.1, True), ("bf16-mixed", 100.0, False), ("32-true", 0.1, False)],
)
def test_text_is_moved_in_bfloat16_only_where_that_costs_next_to_nothing(
    monkeypatch: pytest.MonkeyPatch, precision: str, size: float, halves: bool
) -> None:
    monkeypatch.setattr(language_blocks, "best_precision", lambda *_: precision)
    torch.manual_seed(0)
    way, block = Way(size), nn.Linear(8, 8)
    before = way.hidden.clone()
    language_blocks._advance(way, 0, block, Metric.of(torch.eye(8)))  # type: ignore[arg-type]
    assert way.halves is halves
    assert torch.equal(way.hidden, before)  # what was tried is not what was moved
    assert not torch.is_autocast_enabled("cpu")
