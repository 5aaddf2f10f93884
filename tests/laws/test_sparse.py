"""Laws of solvers that prune, for each pattern and each format that can be sparse."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lighten.errors import BadInput, WrongUse
from lighten.exchange import exchange
from lighten.registry import formats, solvers
from lighten.sparse import Sparse, nearest, pack_mask, pattern_of, unpack_mask
from lighten.sweep import Factor, sweep
from lighten.types import Compressed, Spec, Stats

N = 256
BASES = sorted(name for name in formats if hasattr(formats[name], "apart"))
SOME = ["f16", "f32", "int2_g32", "int4_g128", "int4_g64_sym", "int8_channel_sym"]
PATTERNS = ["0.3", "0.5", "0.83", "1:4", "2:4", "4:8"]
PRUNERS = ["magnitude", "obs", "wanda"]


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stats(n: int = N, seed: int = 0, positions: int = 600) -> Stats:
    g = draw(seed)
    x = torch.randn(positions, n, generator=g)
    x = x @ (torch.eye(n) + 0.8 * n**-0.5 * torch.randn(n, n, generator=g))
    x *= torch.exp(0.7 * torch.randn(n, generator=g))
    return Stats(positions, x.T @ x / positions)


def weight(rows: int = 8, n: int = N, seed: int = 1) -> Tensor:
    return torch.randn(rows, n, generator=draw(seed)) * 0.05


def solved(text: str, w: Tensor, seen: Stats | None) -> Compressed:
    spec = Spec.parse(text)
    found: Compressed = solvers[str(spec.solver)](w, seen, spec)
    return found


def error(w: Tensor, q: Tensor, seen: Stats) -> float:
    d = (w - q).double()
    return float(((d @ seen.hessian.double()) * d).sum())


def mask(c: Compressed) -> Tensor:
    return unpack_mask(c.parts["mask"], c.shape[1])


@pytest.mark.parametrize("solver", PRUNERS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("base", SOME)
def test_exactly_so_many_stay_where_the_pattern_says(base: str, pattern: str, solver: str) -> None:
    w = weight()
    found = solved(f"{base}+{pattern}@{solver}", w, stats())
    stays = mask(found)
    assert not found.dense()[~stays].any()
    if ":" in pattern:
        n, m = (int(p) for p in pattern.split(":"))
        assert (stays.view(-1, m).sum(1) == n).all()
    else:
        assert int((~stays).sum()) == round(float(pattern) * w.numel())


@pytest.mark.parametrize("pattern", ["0.37", "0.5", "1:3", "2:4"])
@pytest.mark.parametrize("shape", [(1, 12), (7, 60), (16, 27), (3, 300), (5, 132)])
def test_counts_are_exact_for_odd_shapes(shape: tuple[int, int], pattern: str) -> None:
    """Convolutions have rows of 27, and groups need not divide the sweep's spans."""
    if pattern_of(pattern).accepts(shape) is not None:
        pytest.skip("rows are no multiple of the pattern")
    for solver in PRUNERS:
        stays = mask(solved(f"f32+{pattern}@{solver}", weight(*shape), stats(shape[1])))
        if ":" in pattern:
            n, m = (int(p) for p in pattern.split(":"))
            assert (stays.view(-1, m).sum(1) == n).all()
        else:
            assert int((~stays).sum()) == round(float(pattern) * stays.numel())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("base", SOME)
def test_obs_is_never_above_the_plain_ones_and_well_below(base: str, pattern: str) -> None:
    w, seen = weight(16), stats()
    ours = error(w, solved(f"{base}+{pattern}@obs", w, seen).dense(), seen)
    for plain in ("magnitude", "wanda"):
        theirs = error(w, solved(f"{base}+{pattern}@{plain}", w, seen).dense(), seen)
        assert ours <= theirs
        if base != "int2_g32":
            assert ours < 0.9 * theirs


@pytest.mark.parametrize("kind", ["few positions", "dead columns", "nothing", "one direction"])
@pytest.mark.parametrize("text", ["f32+0.5", "int4_g128+2:4", "int8_channel_sym+0.8"])
def test_whatever_the_inputs_it_is_finite_and_not_above_the_plain_ones(
    text: str, kind: str
) -> None:
    g = draw(2)
    x = torch.randn(400, N, generator=g)
    if kind == "few positions":
        x = x[:20]
    elif kind == "dead columns":
        x[:, ::3] = 0
    elif kind == "nothing":
        x.zero_()
    else:
        x = x[:, :1].expand(-1, N)
    w, seen = weight(), Stats(len(x), x.T @ x / len(x))
    ours = solved(f"{text}@obs", w, seen)
    assert torch.isfinite(ours.dense()).all()
    for plain in ("magnitude", "wanda"):
        theirs = error(w, solved(f"{text}@{plain}", w, seen).dense(), seen)
        assert error(w, ours.dense(), seen) <= theirs * (1 + 1e-4) + 1e-12


@pytest.mark.parametrize("pattern", ["0.5", "0.8", "2:4"])
@pytest.mark.parametrize("solver", ["obs", "gptq", "wanda"])
def test_with_independent_equal_inputs_it_is_magnitude(solver: str, pattern: str) -> None:
    w, seen = weight(), Stats(9, torch.eye(N))
    ours = solved(f"f32+{pattern}@{solver}", w, seen).dense()
    plain = solved(f"f32+{pattern}@magnitude", w, seen).dense()
    if solver == "wanda" and ":" not in pattern:  # it compares within rows
        each = round(float(pattern) * N)
        rows = [(row == 0).sum().item() for row in ours]
        assert all(abs(count - each) <= 1 for count in rows)
        assert (ours.abs() >= 0).all()
        plain = torch.stack([row * (row.abs() > row.abs().sort().values[c - 1])
                             for row, c in zip(w, rows, strict=True)])  # fmt: skip
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("pattern", ["0.5", "0.67", "2:4", "1:3"])
def test_near_the_best_of_all_masks(pattern: str) -> None:
    """Against least squares on every mask there is (of one row of 6 or 8)."""
    n = 8 if pattern.endswith("4") else 6
    ratios = []
    for seed in range(24):
        seen, w = stats(n, seed, 60), weight(1, n, seed)
        hessian = seen.hessian.double()
        best = float("inf")
        for bits in itertools.product([False, True], repeat=n):
            stays = torch.tensor([bits])
            if ":" in pattern:
                k, m = (int(p) for p in pattern.split(":"))
                if (stays.view(-1, m).sum(1) != k).any():
                    continue
            elif int((~stays).sum()) != round(float(pattern) * n):
                continue
            at = stays[0].nonzero().flatten()
            q = torch.zeros(1, n, dtype=torch.float64)
            right = (w.double() @ hessian)[0, at]
            q[0, at] = torch.linalg.solve(hessian[at][:, at], right)
            best = min(best, error(w, q, seen))
        ours = error(w, solved(f"f32+{pattern}@obs", w, seen).dense(), seen)
        assert ours > best * (1 - 1e-4)
        ratios.append(ours / best)
    ratios.sort()
    assert ratios[len(ratios) // 2] < 1.01  # the best or next to it in most cases
    assert ratios[len(ratios) * 2 // 3] < 1.25


def test_what_stays_is_solved_by_least_squares() -> None:
    w, seen = weight(4, 64), stats(64)
    found = solved("f32+0.5@obs", w, seen)
    damped = seen.hessian + 0.02 * seen.hessian.diagonal().mean() * torch.eye(64)
    pull = (w - found.dense()) @ damped  # the gradient vanishes where a weight may move
    assert pull[mask(found)].abs().max() < 0.02 * pull[~mask(found)].abs().max()


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_rounding_in_a_sweep_beats_rounding_to_nearest_what_was_pruned(pattern: str) -> None:
    w, seen = weight(16), stats()
    ours = error(w, solved(f"int4_g64+{pattern}@obs", w, seen).dense(), seen)
    sparse = solved(f"f32+{pattern}@obs", w, seen)
    fmt = Sparse(formats["int4_g64"], pattern)
    grid = fmt.fit_kept(sparse.dense(), mask(sparse), seen.hessian.diagonal())
    apart = fmt.decode(fmt.encode(sparse.dense(), grid), grid)
    assert ours < error(w, apart, seen)


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "4:8"])
@pytest.mark.parametrize("base", ["f32", "int4_g64", "int8_channel_sym", "int4_g32"])
def test_one_sweep_can_prune_and_round(base: str, pattern: str) -> None:
    w, seen, fmt = weight(16), stats(), Sparse(formats[base], pattern)
    codes, grid = sweep(w, Factor.of(seen.hessian), fmt.base, fmt.pattern)
    plain = solved(f"{base}+{pattern}@wanda", w, seen)
    assert int(grid["mask"].sum()) == int(mask(plain).sum())
    assert error(w, fmt.decode(codes, grid), seen) < error(w, plain.dense(), seen)


def test_an_exchange_never_raises_the_error_nor_the_count() -> None:
    w, seen = weight(8, 64), stats(64)
    for text in ("0.5", "2:4"):
        start = mask(solved(f"f32+{text}@wanda", w, seen))
        q, kept = exchange(w, seen.hessian, w * start, start, pattern_of(text), 20)
        assert not q[~kept].any()
        assert torch.equal(kept.sum(1), start.sum(1))
        if ":" in text:
            assert (kept.view(-1, 4).sum(1) == 2).all()
        assert error(w, q, seen) < 0.95 * error(w, w * start, seen)


@pytest.mark.parametrize("pattern", ["0.4", "2:4"])
@pytest.mark.parametrize("base", BASES)
def test_bytes_are_mask_codes_and_scales(base: str, pattern: str) -> None:
    w, fmt = weight(8), formats[base]
    found = solved(f"{base}+{pattern}@magnitude", w, stats())
    grid = fmt.pack(fmt.encode(w, fmt.fit(w)), fmt.fit(w))
    scales = sum(p.numel() * p.element_size() for k, p in grid.items() if k != fmt.apart)
    stays = int(mask(found).sum())
    assert found.nbytes() == scales + w.numel() // 8 + (stays * fmt.code_bits + 7) // 8
    assert found.nbytes() == sum(p.numel() * p.element_size() for p in found.parts.values())
    assert abs(found.nbytes() - found.format.bits(N) * w.numel() / 8) <= 8


@pytest.mark.parametrize("pattern", ["0.4", "2:4"])
@pytest.mark.parametrize("base", BASES)
def test_rows_can_be_taken_in_any_order(base: str, pattern: str) -> None:
    found = solved(f"{base}+{pattern}@magnitude", weight(5), stats())
    index = torch.tensor([3, 0, 4])
    taken = found.rows(index)
    assert torch.equal(taken.dense(), found.dense()[index])
    assert taken.shape == (3, N)
    codes, grid = found.format.unpack(found.parts, found.shape)
    again = found.format.pack(codes, grid)
    assert all(torch.equal(again[k], p) for k, p in found.parts.items())
    assert torch.equal(found.dense(), found.format.decode(codes, grid))


@pytest.mark.parametrize("base", BASES)
def test_a_weight_may_lose_all_it_has(base: str) -> None:
    spec, w = Spec.parse(f"{base}+0.5"), weight()
    none = torch.zeros(w.shape, dtype=torch.bool)
    found = nearest(w, none, Sparse.of(spec), None, spec)
    assert not found.dense().any()
    assert not mask(found.rows(torch.tensor([3, 1]))).any()


def test_a_threshold_says_which_go() -> None:
    w = weight()
    found = solved("f32+t0.05@magnitude", w, None)
    assert torch.equal(found.dense(), w * (w.abs() > 0.05))
    for solver in ("wanda", "obs"):
        with pytest.raises(WrongUse, match="threshold"):
            solved(f"f32+t0.05@{solver}", w, stats())


@pytest.mark.parametrize(
    "text", ["f32+0.5@obs", "int8_channel_sym+2:4@gptq", "f16+t0.01@magnitude", "0.5", "bf16+t1e-3"]
)
def test_specs_round_trip(text: str) -> None:
    spec = Spec.parse(text)
    assert spec.sparsity
    assert str(spec) == text
    assert Spec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("q4_0+0.5@obs", "no room for a mask"),
        ("0.5@obs", "stored as"),
        ("f32+4:2@obs", "4:2"),
        ("f32+0.0@wanda", "0.0"),
        ("int4_g64+0.5@rtn", "only rounds"),
    ],
)
def test_what_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(WrongUse, match=words):
        solved(text, weight(), stats())


@pytest.mark.parametrize("solver", PRUNERS)
@pytest.mark.parametrize("text", ["f32+0.5", "int4_g64+2:4"])
def test_weights_that_are_no_numbers_are_refused(text: str, solver: str) -> None:
    w = weight()
    w[2, 5] = float("nan")
    with pytest.raises(BadInput, match="NaN"):
        solved(f"{text}@{solver}", w, stats())


def test_a_damaged_weight_is_refused() -> None:
    found = solved("f32+0.5@magnitude", weight(), None)
    short = {**found.parts, "bytes": found.parts["bytes"][:-4]}
    with pytest.raises(BadInput, match="positions in its mask"):
        Compressed(found.spec, found.shape, found.format, short).dense()


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64])
def test_masks_pack_bit_by_bit(n: int) -> None:
    kept = torch.rand(3, n, generator=draw(n)) > 0.5
    packed = pack_mask(kept)
    assert packed.shape == (3, (n + 7) // 8)
    assert torch.equal(unpack_mask(packed, n), kept)
    assert int(packed[0, 0]) & 1 == int(kept[0, 0])
