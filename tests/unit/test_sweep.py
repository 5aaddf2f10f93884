"""The sweep and the descent, checked against what they claim to minimise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lighten.errors import BadInput
from lighten.registry import formats
from lighten.sweep import Factor, descend, row_errors, sweep

N = 256
GRIDDED = sorted(n for n in formats if formats[n].block != 1)
WHOLE = [n for n in GRIDDED if formats[n].sub == formats[n].block]
few = settings(max_examples=2, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hessian(seed: int, n: int = N, positions: int = 300) -> Tensor:
    g = draw(seed)
    x = torch.randn(positions, n, generator=g)
    x = x @ (torch.eye(n) + 0.8 * n**-0.5 * torch.randn(n, n, generator=g))
    x *= torch.exp(torch.randn(n, generator=g))
    return x.T @ x / positions


def weight(seed: int, rows: int = 4, n: int = N) -> Tensor:
    return torch.randn(rows, n, generator=draw(seed)) * 0.05


def errors(w: Tensor, q: Tensor, h: Tensor) -> Tensor:
    return row_errors(w.double(), q.double(), h.double())


# -- the factor ------------------------------------------------------------------------------------
@given(seed=seeds, n=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_importance_is_what_is_left_when_later_columns_make_up(seed: int, n: int) -> None:
    """1 / diag(U)²: the least Δ H Δᵀ with Δ 1 in column i and 0 before it, found directly."""
    h = hessian(seed, n, 3 * n).double()
    factor = Factor.of((h + h.T) / 2)
    for i in range(n):
        h = factor.hessian[i:, i:]
        rest = -torch.linalg.solve(h[1:, 1:], h[1:, 0]) if i + 1 < n else h.new_zeros(0)
        d = torch.cat([h.new_ones(1), rest])
        assert float(d @ h @ d) == pytest.approx(float(factor.importance[i]), rel=1e-8)
    inverse = factor.upper.T @ factor.upper
    assert torch.allclose(inverse @ factor.hessian, torch.eye(n, dtype=torch.float64), atol=1e-8)


def _singular(kind: str) -> Tensor:
    g = draw(0)
    if kind == "zero":
        return torch.zeros(64, 64)
    if kind == "rank one":
        v = torch.randn(64, 1, generator=g)
        return v @ v.T
    if kind == "dead columns":
        h = hessian(1, 64)
        h[::5] = 0
        h[:, ::5] = 0
        return h
    if kind == "not quite positive":  # rounding in sums of float32 does this
        h = hessian(2, 64, 8)
        return h - 0.1 * h.diagonal().mean() * torch.eye(64)
    return {"huge": 1e20, "tiny": 1e-9}[kind] * hessian(3, 64, 8)


@pytest.mark.parametrize(
    "kind", ["zero", "rank one", "dead columns", "not quite positive", "huge", "tiny"]
)
def test_a_singular_hessian_is_damped_until_it_factorises(kind: str) -> None:
    h = _singular(kind)
    factor = Factor.of(h)
    for t in (factor.hessian, factor.upper, factor.importance):
        assert torch.isfinite(t).all()
    assert (factor.importance > 0).all()
    added = factor.hessian - h
    share = added.diagonal().mean() / h.diagonal().mean().clamp(min=1e-12)
    assert torch.allclose(added, torch.diag(added.diagonal()))
    assert share > 0.019
    assert share < (1 if kind == "not quite positive" else 0.1)  # no more than it takes


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(value: float) -> None:
    h = hessian(0, 8)
    h[2, 5] = h[5, 2] = value
    with pytest.raises(BadInput, match="NaN or infinite"):
        Factor.of(h)


def test_row_errors_are_the_quadratic_form() -> None:
    w, q, h = weight(0, 3, 8).double(), weight(1, 3, 8).double(), hessian(0, 8).double()
    expected = [float((a - b) @ h @ (a - b)) for a, b in zip(w, q, strict=True)]
    assert row_errors(w, q, h).tolist() == pytest.approx(expected)


# -- the sweep -------------------------------------------------------------------------------------
def test_the_sweep_is_the_textbook_one() -> None:
    """One column at a time, each followed by the exact best correction of all later ones."""
    fmt, n = formats["int4_channel"], 40
    w, factor = weight(0, 3, n), Factor.of(hessian(0, n))
    codes, grid = sweep(w, factor, fmt)
    left, h = w.double().clone(), factor.hessian.double()
    for i in range(n):
        new = fmt.decode(fmt.encode(left[:, i : i + 1].float(), grid, i), grid, i)[:, 0].double()
        error = left[:, i] - new
        if i + 1 < n:
            best = torch.linalg.solve(h[i + 1 :, i + 1 :], h[i + 1 :, i])
            left[:, i + 1 :] += error[:, None] * best
        left[:, i] = new
    same = torch.isclose(fmt.decode(codes, grid).double(), left, atol=1e-6).all(1)
    assert same.sum() >= 2  # a tie may fall the other way


@pytest.mark.parametrize("name", WHOLE)
def test_without_correlations_the_sweep_rounds_to_nearest(name: str) -> None:
    fmt, w = formats[name], weight(0)
    factor = Factor.of(torch.diag(torch.exp(torch.randn(N, generator=draw(3)))))
    codes, grid = sweep(w, factor, fmt)
    whole = fmt.fit(w, factor.importance)
    nearest = fmt.decode(fmt.encode(w, whole), whole)
    assert torch.allclose(fmt.decode(codes, grid), nearest, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", GRIDDED)
def test_the_sweep_beats_rounding_on_the_same_importance(name: str) -> None:
    fmt, w, factor = formats[name], weight(0), Factor.of(hessian(0))
    codes, grid = sweep(w, factor, fmt)
    whole = fmt.fit(w, factor.importance)
    nearest = fmt.decode(fmt.encode(w, whole), whole)
    swept = errors(w, fmt.decode(codes, grid), factor.hessian).sum()
    assert swept < 0.95 * errors(w, nearest, factor.hessian).sum()


# -- the descent -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", GRIDDED)
@few
@given(seed=seeds, passes=st.integers(1, 3), start=st.sampled_from(["sweep", "nearest"]))
def test_descent_never_raises_the_error(name: str, seed: int, passes: int, start: str) -> None:
    fmt, w, factor = formats[name], weight(seed), Factor.of(hessian(seed))
    if start == "sweep":
        codes, grid = sweep(w, factor, fmt)
    else:
        grid = fmt.fit(w)
        codes = fmt.encode(w, grid)
    given_codes, given_grid = codes.clone(), {k: g.clone() for k, g in grid.items()}
    before = errors(w, fmt.decode(codes, grid), factor.hessian)
    new_codes, new_grid = descend(w, factor.hessian, fmt, codes, grid, passes)
    after = errors(w, fmt.decode(new_codes, new_grid), factor.hessian)
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < before.sum()
    # what it makes can be stored, and what it was given it leaves alone
    stored = fmt.unpack(fmt.pack(new_codes, new_grid), (4, N))
    assert torch.equal(fmt.decode(*stored), fmt.decode(new_codes, new_grid))
    assert torch.equal(codes, given_codes)
    assert all(torch.equal(grid[k], given_grid[k]) for k in grid)


@pytest.mark.parametrize("name", ["int4_channel_sym", "q4_1", "q4_k"])
def test_descent_ends_where_no_single_code_can_be_bettered(name: str) -> None:
    fmt, w, h = formats[name], weight(0, 2), Factor.of(hessian(0)).hessian
    codes, grid = descend(w, h, fmt, *sweep(w, Factor.of(hessian(0)), fmt), 40)
    reached = errors(w, fmt.decode(codes, grid), h)
    for j in range(0, N, 17):
        for step in (-1, 1):
            other = codes.clone()
            other[:, j] = (other[:, j].int() + step).clamp(0, 15).to(torch.uint8)
            assert (errors(w, fmt.decode(other, grid), h) >= reached * (1 - 1e-5)).all()


@pytest.mark.parametrize("name", GRIDDED)
def test_descent_by_a_hessian_of_each_row_is_that_of_the_rows_alone(name: str) -> None:
    fmt, w = formats[name], weight(3)
    each = torch.stack([Factor.of(hessian(seed)).hessian for seed in range(len(w))])
    grid = fmt.fit(w)
    codes = fmt.encode(w, grid)
    together = fmt.decode(*descend(w, each, fmt, codes, grid, 2))
    for i, h in enumerate(each):
        row = slice(i, i + 1)
        own = {k: g[row] for k, g in grid.items()}
        alone = fmt.decode(*descend(w[row], h, fmt, codes[row], own, 2))
        now, was = (errors(w[row], q, h) for q in (together[row], fmt.decode(codes[row], own)))
        assert now <= was * (1 + 1e-4)
        assert torch.allclose(now, errors(w[row], alone, h), rtol=1e-2)


def test_descent_follows_the_pull_that_it_is_given() -> None:
    """The error (q - t) H (q - t) has half the negative gradient (t - q) H, whatever w is."""
    fmt, w, h = formats["int4_channel_sym"], weight(0), Factor.of(hessian(0)).hessian
    grid = fmt.fit(w)
    codes = fmt.encode(w, grid)
    q = fmt.decode(codes, grid)
    wanted = descend(w, h, fmt, codes, grid, 2)
    found = descend(torch.zeros_like(w), h, fmt, codes, grid, 2, (w - q) @ h)
    assert torch.equal(found[0], wanted[0])
