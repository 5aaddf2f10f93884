"""Weights that learn in their formats: what is computed with is always what would be stored."""

from __future__ import annotations

import pytest
import torch

from lighten.errors import WrongUse
from lighten.learned_weight import LearnedWeight, learnable
from lighten.registry import formats
from lighten.types import Compressed, Spec

FORMATS = ["q4_0", "q5_1", "q8_0", "iq4_nl", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs",
           "int4_g32", "int3_g64_sym", "int8_channel"]  # fmt: skip


def compressed(name: str, rows: int = 6, columns: int = 512) -> tuple[Compressed, torch.Tensor]:
    torch.manual_seed(len(name))
    w = torch.randn(rows, columns) * torch.rand(rows, 1)
    w[1] = 0
    format = formats[name]
    grid = format.fit(w)
    parts = format.pack(format.encode(w, grid), grid)
    return Compressed(Spec(format=name), (rows, columns), format, parts), w


@pytest.mark.parametrize("mode", ["scales", "all"])
@pytest.mark.parametrize("name", FORMATS)
def test_untouched_it_is_the_weight_and_moved_it_is_what_it_stores(name: str, mode: str) -> None:
    before, w = compressed(name)
    learned = LearnedWeight(before, mode, w)
    assert torch.equal(learned(torch.empty(0)), before.dense())
    same = learned.freeze()
    assert torch.equal(same.dense(), before.dense())  # the bytes of a zero may have lost its sign
    with torch.no_grad():
        for p in learned.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.shape == w.shape else 0.05))
    after = learned.freeze()
    assert torch.equal(after.dense(), learned(torch.empty(0)))
    assert not torch.equal(after.dense(), before.dense())
    assert after.nbytes() == before.nbytes()
    codes, _ = before.format.unpack(before.parts, before.shape)
    moved, _ = after.format.unpack(after.parts, after.shape)
    assert torch.equal(codes, moved) == (mode == "scales")


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_those_of_the_grid(name: str) -> None:
    """Decoding is linear in each tensor of the grid, so a difference quotient is exact."""
    before, w = compressed(name)
    learned = LearnedWeight(before)
    side = torch.randn_like(w)
    (learned(torch.empty(0)) * side).sum().backward()
    codes, grid = before.format.unpack(before.parts, before.shape)
    for part, theta in learned.theta.items():
        assert theta.grad is not None
        moved = dict(grid)
        moved[part] = grid[part].clone()
        moved[part][0] += 1.0
        change = before.format.decode(codes, moved) - before.format.decode(codes, grid)
        unit = getattr(learned, f"unit_{part}")
        expected = (change * side)[0].sum() * unit[0].flatten()[0]
        assert torch.allclose(theta.grad[0].sum(), expected, rtol=1e-3, atol=1e-3)


def test_it_learns_a_better_grid_in_the_same_bytes() -> None:
    before, w = compressed("q4_0")
    target = w * 1.1  # every scale is 10 % too small
    learned = LearnedWeight(before)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        (learned(torch.empty(0)) - target).square().sum().backward()
        optimizer.step()
    now, then = ((x.dense() - target).square().sum() for x in (learned.freeze(), before))
    assert now < 0.5 * then


@pytest.mark.parametrize("name", ["q4_k", "q6_k", "iq4_xs"])
def test_sub_scales_move_at_the_rate_of_scales(name: str) -> None:
    before, w = compressed(name)
    codes, grid = before.format.unpack(before.parts, before.shape)
    grid["scale"] = (grid["scale"] - 2.0 * (grid["scale"] > 3)).contiguous()
    low = Compressed(before.spec, before.shape, before.format, before.format.pack(codes, grid))
    learned = LearnedWeight(low)
    optimizer = torch.optim.Adam(learned.theta.values(), lr=3e-4)
    for _ in range(60):
        optimizer.zero_grad()
        (learned(torch.empty(0)) - w).square().sum().backward()
        optimizer.step()
    _, now = low.format.unpack(learned.freeze().parts, low.shape)
    assert float((now["scale"] != grid["scale"]).float().mean()) > 0.2


def test_what_cannot_learn() -> None:
    before, w = compressed("q4_0")
    assert learnable(before)
    half = formats["f16"]
    plain = Compressed(Spec(format="f16"), (6, 512), half, half.pack(half.encode(w, {}), {}))
    assert not learnable(plain)
    with pytest.raises(WrongUse, match="cannot be learned"):
        LearnedWeight(before, "some")
    with pytest.raises(WrongUse, match="original"):
        LearnedWeight(before, "all")
