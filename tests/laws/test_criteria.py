"""Laws that every registered criterion keeps; a new one inherits them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lighten.errors import BadInput, WrongUse
from lighten.importance import choose
from lighten.registry import criteria
from lighten.types import Stats

OUT, IN = 24, 40
CRITERIA = sorted(criteria)
each = pytest.mark.parametrize("name", CRITERIA)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(seed: int = 0) -> Tensor:
    g = draw(seed)
    size = torch.exp(0.8 * torch.randn(OUT, 1, generator=g))
    return torch.randn(OUT, IN, generator=g) * size * 0.1


def stats(w: Tensor, seed: int = 1) -> Stats:
    """All that a criterion may need, as a linear layer has it whose loss is its squared output."""
    g = draw(seed)
    x = torch.randn(900, IN, generator=g)
    x = x @ (torch.eye(IN) + 0.8 * IN**-0.5 * torch.randn(IN, IN, generator=g))
    x *= torch.exp(0.8 * torch.randn(IN, generator=g))
    hessian = x.T @ x / len(x)
    output = w @ hessian
    energy = (output * w).sum(1)
    curvature = hessian.diagonal().expand_as(w)
    return Stats(len(x), hessian, slope=output, curvature=curvature, scale=energy.sqrt())


def permuted(seen: Stats, rows: Tensor, columns: Tensor) -> Stats:
    assert seen.slope is not None
    assert seen.curvature is not None
    assert seen.scale is not None
    return replace(
        seen,
        hessian=seen.hessian[columns][:, columns],
        slope=seen.slope[rows][:, columns],
        curvature=seen.curvature[rows][:, columns],
        scale=seen.scale[rows],
    )


@each
def test_a_score_for_every_weight_none_below_zero(name: str) -> None:
    w = weight()
    before = w.clone()
    score = criteria[name](w, stats(w))
    assert score.shape == w.shape
    assert torch.isfinite(score).all()
    assert (score >= 0).all()
    assert torch.equal(w, before)


@each
def test_permuted_weights_have_permuted_scores(name: str) -> None:
    w = weight()
    seen = stats(w)
    rows, columns = torch.randperm(OUT, generator=draw(3)), torch.randperm(IN, generator=draw(4))
    moved = criteria[name](w[rows][:, columns], permuted(seen, rows, columns))
    assert torch.allclose(moved, criteria[name](w, seen)[rows][:, columns], rtol=1e-3)


@each
def test_signs_do_not_matter(name: str) -> None:
    if name == "fpgm":
        pytest.skip("distances between outputs change with their signs")
    w = weight()
    signs = torch.randn(OUT, 1, generator=draw(5)).sign()
    seen = stats(w)
    assert seen.slope is not None
    turned = replace(seen, slope=seen.slope * signs)
    assert torch.allclose(criteria[name](w * signs, turned), criteria[name](w, seen), rtol=1e-4)


@each
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_what_it_drops_costs_less_than_what_chance_drops(name: str, share: float) -> None:
    """Outputs where it judges outputs, else single weights: tr(Δ H Δᵀ) of what is gone."""
    w = weight()
    seen = stats(w)
    score = criteria[name](w, seen)

    def cost(lost: Tensor) -> float:
        d = w * lost
        return float(((d @ seen.hessian) * d).sum())

    def lost(of: Tensor) -> Tensor:
        mask = torch.zeros_like(of)
        mask[of.argsort()[: round(share * len(of))]] = 1
        return mask

    whole = getattr(criteria[name], "outputs", False)
    units = score.sum(1) if whole else score.flatten()

    def shaped(mask: Tensor) -> Tensor:
        return mask[:, None] if whole else mask.view(w.shape)

    ours = cost(shaped(lost(units)))
    g = draw(9)
    chance = sorted(cost(shaped(lost(torch.rand(len(units), generator=g)))) for _ in range(40))
    assert ours < chance[2]  # better than 37 of 40 draws
    assert ours < 0.9 * sum(chance) / len(chance)


@each
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_exactly_so_many_units_stay(name: str, share: float) -> None:
    w = weight()
    score = criteria[name](w, stats(w))
    scores = {"rows": score.sum(1), "columns": score.sum(0)}
    kept = choose(scores, share)
    assert sum(len(k) for k in kept.values()) == OUT + IN - round(share * (OUT + IN))
    apart = choose(scores, share, per_axis=True)
    assert len(apart["rows"]) == round(OUT * (1 - share))
    assert len(apart["columns"]) == round(IN * (1 - share))


@each
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(name: str, value: float) -> None:
    w = weight()
    seen = stats(w)
    w[3, 4] = value
    with pytest.raises(BadInput, match="NaN or infinite"):
        criteria[name](w, seen)


@each
def test_statistics_that_are_no_numbers_are_refused_where_they_are_used(name: str) -> None:
    w = weight()
    nan = torch.full((OUT, IN), float("nan"))
    bad = Stats(9, torch.full((IN, IN), float("nan")), slope=nan, curvature=nan, scale=nan[:, 0])
    try:
        without = criteria[name](w, None)
    except WrongUse:
        with pytest.raises(BadInput, match="NaN or infinite"):
            criteria[name](w, bad)
    else:
        assert torch.equal(without, criteria[name](w, bad))


@each
def test_groups_of_a_convolution_are_judged_each_on_its_own_inputs(name: str) -> None:
    w = weight()
    seen = stats(w)
    other = stats(w, seed=8)
    both = replace(seen, hessian=torch.stack([seen.hessian, other.hessian]))
    found = criteria[name](w, both)
    half = OUT // 2
    assert torch.allclose(found[:half], criteria[name](w, seen)[:half], rtol=1e-4)
    alike = replace(seen, hessian=other.hessian)
    assert torch.allclose(found[half:], criteria[name](w, alike)[half:], rtol=1e-4)
