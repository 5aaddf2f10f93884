"""Laws that every registered format keeps; a new one inherits them."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.errors import BadInput
from lighten.registry import formats

N = 512  # a multiple of every block
NAMES = sorted(formats)
GRIDDED = [n for n in NAMES if formats[n].block != 1]
REFITTED = [n for n in NAMES if formats[n].sub != formats[n].block]
few = settings(max_examples=4, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
magnitudes = st.sampled_from([1e-9, 1e-4, 0.02, 1.0, 300.0])
kinds = st.sampled_from(["gauss", "heavy", "one-sided", "sparse"])


def weights(seed: int, kind: str = "gauss", rows: int = 5, n: int = N) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, n, generator=g)
    if kind == "heavy":
        w = w * torch.exp(torch.randn(rows, n, generator=g))
    elif kind == "one-sided":
        w = w.abs() + 0.5
    elif kind == "sparse":
        w = w * (torch.rand(rows, n, generator=g) < 0.1)
    return w


def importances(seed: int, n: int = N) -> torch.Tensor:
    return torch.exp(1.5 * torch.randn(n, generator=torch.Generator().manual_seed(seed)))


def rounded(name: str, w: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    f = formats[name]
    grid = f.fit(w, importance)
    return f.decode(f.encode(w, grid), grid)


def code_count(name: str) -> int:
    return 1 << int(re.search(r"\d", name)[0])  # type: ignore[index]


@pytest.mark.parametrize("name", NAMES)
@few
@given(seed=seeds, kind=kinds, magnitude=magnitudes)
def test_encoding_what_was_decoded_changes_nothing(
    name: str, seed: int, kind: str, magnitude: float
) -> None:
    f, w = formats[name], weights(seed, kind) * magnitude
    grid = f.fit(w)
    once = f.decode(f.encode(w, grid), grid)
    assert torch.isfinite(once).all()
    assert torch.equal(f.decode(f.encode(once, grid), grid), once)


@pytest.mark.parametrize("name", NAMES)
@few
@given(seed=seeds, kind=kinds, magnitude=magnitudes)
def test_never_worse_than_all_zeros(name: str, seed: int, kind: str, magnitude: float) -> None:
    w = weights(seed, kind) * magnitude
    error = (rounded(name, w) - w).double().square().sum()
    assert error <= w.double().square().sum()


@pytest.mark.parametrize("name", GRIDDED)
def test_encode_gives_the_nearest_number(name: str) -> None:
    f, w = formats[name], weights(3, rows=2)
    grid = f.fit(w)
    beyond = w * 1.5  # also what the grid does not reach
    # llama.cpp's kernels take the magnitude of a Q8_0 level as an int8: -128 is never stored
    first = 1 if name == "q8_0" else 0
    codes = torch.arange(first, code_count(name), dtype=torch.uint8)
    every = torch.stack([f.decode(c.expand(w.shape).contiguous(), grid) for c in codes])
    least = (every - beyond).abs().amin(0)
    ours = (f.decode(f.encode(beyond, grid), grid) - beyond).abs()
    assert (ours <= least + 1e-5 * beyond.abs().amax()).all()
    assert torch.unique(f.encode(w, grid)).numel() > 0.7 * min(code_count(name), 64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 3])
def test_bits_are_the_packed_bytes_and_unpack_inverts_pack(name: str, rows: int) -> None:
    f, w = formats[name], weights(4, rows=rows)
    grid = f.fit(w)
    codes = f.encode(w, grid)
    packed = f.pack(codes, grid)
    assert all(p.shape[0] == rows for p in packed.values())
    stored = sum(p.numel() * p.element_size() for p in packed.values())
    assert stored * 8 == f.bits(N) * w.numel()
    again, grid_again = f.unpack(packed, (rows, N))
    assert torch.equal(codes, again)
    assert grid.keys() == grid_again.keys()
    for key, value in grid.items():
        assert value.shape == grid_again[key].shape
        assert torch.equal(value, grid_again[key])
    assert torch.equal(f.decode(codes, grid), f.decode(again, grid_again))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cuts", [(0, 32, 64, 256, 512), (0, 1, 2, 31, 33, 255, 257, 400, 512)])
def test_step_by_step_is_the_same_as_whole(name: str, cuts: tuple[int, ...]) -> None:
    f, w = formats[name], weights(5)
    grid = f.fit(w)
    codes = f.encode(w, grid)
    parts = [(a, b) for a, b in itertools.pairwise(cuts)]
    assert all((b - a) % f.step == 0 for a, b in parts)
    assert torch.equal(torch.cat([f.encode(w[:, a:b], grid, a) for a, b in parts], 1), codes)
    decoded = torch.cat([f.decode(codes[:, a:b], grid, a) for a, b in parts], 1)
    assert torch.equal(decoded, f.decode(codes, grid))


@pytest.mark.parametrize("name", [n for n in GRIDDED if formats[n].block])
def test_grids_of_successive_blocks_join_along_columns(name: str) -> None:
    f, w, imp = formats[name], weights(6), importances(6)
    grid = f.fit(w, imp)
    half = [f.fit(w[:, :256], imp[:256]), f.fit(w[:, 256:], imp[256:])]
    joined = {k: torch.cat([h[k] for h in half], 1) for k in grid}
    assert {k: v.shape for k, v in joined.items()} == {k: v.shape for k, v in grid.items()}
    error = [(imp * (f.decode(f.encode(w, g), g) - w) ** 2).sum() for g in (grid, joined)]
    assert error[1] == pytest.approx(float(error[0]), rel=0.01)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.37, -0.37, 3.0])
def test_constant_and_zero_rows(name: str, value: float) -> None:
    w = torch.full((3, N), value)
    w[1] = 0
    got = rounded(name, w)
    assert (got[1] == 0).all()
    assert torch.allclose(got, w, rtol=4e-3, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused_by_name(name: str, bad: float) -> None:
    w = weights(7)
    w[2, 100] = bad
    with pytest.raises(BadInput, match=name):
        formats[name].fit(w)


@pytest.mark.parametrize("name", GRIDDED)
def test_importance_lowers_the_error_it_weighs(name: str) -> None:
    w, imp = weights(8, rows=24), importances(8)
    with_it, without = ((imp * (rounded(name, w, i) - w) ** 2).sum() for i in (imp, None))
    assert with_it < without


@pytest.mark.parametrize("name", GRIDDED)
def test_importance_per_row_is_importance_per_column_repeated(name: str) -> None:
    w, imp = weights(9), importances(9)
    assert torch.equal(rounded(name, w, imp), rounded(name, w, imp.expand(5, N)))


@pytest.mark.parametrize("name", GRIDDED)
def test_importance_may_be_zero_and_of_any_scale(name: str) -> None:
    w, imp = weights(10), importances(10)
    imp[:300] = 0
    assert torch.isfinite(rounded(name, w, imp)).all()
    errors = [(imp * (rounded(name, w, imp * s) - w) ** 2).sum() for s in (1.0, 1e-12, 1e9)]
    assert float(max(errors)) <= 1.01 * float(min(errors))
    whole = rounded(name, w, torch.zeros(N))
    assert (whole - w).square().sum() < 0.5 * w.square().sum()


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_fitted_each_for_itself(name: str) -> None:
    w, imp = weights(11, "heavy", rows=40), importances(11)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    error = (imp * (rounded(name, w, imp) - w) ** 2).sum(1)[order]
    permuted = (imp * (rounded(name, w[order], imp) - w[order]) ** 2).sum(1)
    assert torch.allclose(error, permuted, rtol=0.02)


@pytest.mark.parametrize("name", GRIDDED)
@few
@given(seed=seeds, kind=st.sampled_from(["gauss", "heavy"]), weighted=st.booleans())
def test_the_search_beats_the_largest_magnitude(
    name: str, seed: int, kind: str, weighted: bool
) -> None:
    f, w = formats[name], weights(seed, kind)
    imp = importances(seed) if weighted else torch.ones(N)
    middle = code_count(name) // 2
    x = w.view(5, -1, f.sub or N)
    scale = x.abs().amax(2, keepdim=True) / (middle - 1)
    plain = ((x / scale).round().clamp(-middle, middle - 1) * scale).view_as(w)
    error = (imp * (rounded(name, w, imp) - w) ** 2).sum()
    assert error <= (imp * (plain - w) ** 2).sum()


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_do_not_fit_are_refused_with_the_numbers(name: str) -> None:
    f = formats[name]
    assert f.accepts((7, N)) is None
    if f.block > 1:
        why = f.accepts((7, N + 1))
        assert why is not None
        for part in (name, str(f.block), str(N + 1)):
            assert part in why


@pytest.mark.parametrize("name", REFITTED)
@few
@given(seed=seeds, kind=kinds, drift=st.sampled_from([0.0, 0.1, 1.0, 30.0]))
def test_refit_never_raises_the_error_and_touches_one_entry(
    name: str, seed: int, kind: str, drift: float
) -> None:
    f, w, imp = formats[name], weights(seed, kind), importances(seed)
    grid = f.fit(w, imp)
    before = {k: v.clone() for k, v in grid.items()}
    start = 256 + f.sub * (seed % (256 // f.sub))
    columns = slice(start, start + f.sub)
    moved = w[:, columns] + drift * weights(seed + 1)[:, columns]
    new = f.refit(moved, grid, start, imp[columns])

    def error(g: dict[str, torch.Tensor]) -> torch.Tensor:
        return (imp[columns] * (f.decode(f.encode(moved, g, start), g, start) - moved) ** 2).sum(1)

    assert (error(new) <= error(grid) * (1 + 1e-4) + 1e-9).all()
    for key, value in grid.items():
        assert torch.equal(value, before[key])
        assert new[key].shape == value.shape
    decoded = [f.decode(f.encode(w, g), g) for g in (grid, new)]
    same = torch.ones(N, dtype=torch.bool)
    same[columns] = False
    assert torch.equal(decoded[0][:, same], decoded[1][:, same])


@pytest.mark.parametrize("name", REFITTED)
def test_refit_follows_what_moved(name: str) -> None:
    f, w = formats[name], weights(12)
    grid = f.fit(w)
    small = w[:, : f.sub] / 3
    new = f.refit(small, grid, 0)
    before, after = (
        (f.decode(f.encode(small, g, 0), g, 0) - small).square().sum() for g in (grid, new)
    )
    assert after < 0.7 * before


@pytest.mark.parametrize("name", NAMES)
def test_the_input_is_left_alone(name: str) -> None:
    f, w, imp = formats[name], weights(13), importances(13)
    kept, kept_imp = w.clone(), imp.clone()
    grid = f.fit(w, imp)
    f.decode(f.encode(w, grid), grid)
    assert torch.equal(w, kept)
    assert torch.equal(imp, kept_imp)
