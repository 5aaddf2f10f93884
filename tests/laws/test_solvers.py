"""Laws that every registered solver keeps, in every format; a new one inherits them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lighten.errors import BadInput
from lighten.registry import formats, solvers
from lighten.types import Compressed, Spec, Stats

N = 256  # a multiple of every block
SOLVERS = sorted(solvers)
FORMATS = sorted(formats)
SOME = ["int2_channel_sym", "int4_g64", "iq4_nl", "q2_k", "q4_0", "q6_k"]
"""One of each make: whole rows, groups, uneven levels, super-blocks with and without mins."""
PLAIN = ("magnitude", "rtn", "wanda")
SWEEPS = [name for name in SOLVERS if name not in PLAIN]  # they look beyond the diagonal of H

each_solver = pytest.mark.parametrize("solver", SOLVERS)
some_formats = pytest.mark.parametrize("format", SOME)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(kind: str = "correlated", n: int = N, seed: int = 0) -> Tensor:
    """(positions, n): what a layer may see in good and in bad times."""
    g = draw(seed)
    x = torch.randn(400, n, generator=g)
    x = x @ (torch.eye(n) + 0.8 * n**-0.5 * torch.randn(n, n, generator=g))
    x *= torch.exp(torch.randn(n, generator=g))
    if kind == "few positions":
        return x[:20]
    if kind == "dead columns":
        x[:, ::7] = 0
    elif kind == "a dead block":
        x[:, : n // 2] = 0
    elif kind == "nothing at all":
        x.zero_()
    elif kind == "one direction":
        x = x[:, :1].expand(-1, n)
    elif kind == "an outlier":
        x[:, 3] *= 1e4
    elif kind == "faint":
        x *= 1e-5
    elif kind == "loud":
        x *= 1e8
    return x


def stats(x: Tensor) -> Stats:
    return Stats(len(x), x.T @ x / len(x))


def weight(rows: int = 4, n: int = N, scale: float = 0.05, seed: int = 1) -> Tensor:
    return torch.randn(rows, n, generator=draw(seed)) * scale


def solved(solver: str, format: str, w: Tensor, seen: Stats | None) -> Compressed:
    found: Compressed = solvers[solver](w, seen, Spec(format=format, solver=solver))
    return found


def errors(w: Tensor, q: Tensor, hessian: Tensor) -> Tensor:
    """(rows,): Δ H Δᵀ of each row, float64."""
    d = (w - q).double()
    return ((d @ hessian.double()) * d).sum(1)


def not_above(ours: Tensor, theirs: Tensor) -> bool:
    """Row by row; float32 may lose a hair."""
    return bool((ours <= theirs * (1 + 1e-4) + 1e-30).all())


@each_solver
@pytest.mark.parametrize("format", FORMATS)
def test_no_row_is_worse_than_rounded_to_nearest(solver: str, format: str) -> None:
    w, seen = weight(), stats(inputs())
    ours = errors(w, solved(solver, format, w, seen).dense(), seen.hessian)
    nearest = errors(w, solved("rtn", format, w, seen).dense(), seen.hessian)
    assert not_above(ours, nearest)


@each_solver
@some_formats
@pytest.mark.parametrize(
    "kind",
    [
        "few positions",
        "dead columns",
        "a dead block",
        "nothing at all",
        "one direction",
        "an outlier",
        "faint",
        "loud",
    ],
)
def test_whatever_the_inputs_it_is_finite_and_not_worse_than_nearest(
    solver: str, format: str, kind: str
) -> None:
    w, seen = weight(), stats(inputs(kind))
    ours = solved(solver, format, w, seen).dense()
    assert torch.isfinite(ours).all()
    nearest = solved("rtn", format, w, seen).dense()
    assert not_above(errors(w, ours, seen.hessian), errors(w, nearest, seen.hessian))
    # what no input tells of is still rounded, not thrown away
    relative = (w - ours).square().sum(1) / w.square().sum(1)
    if kind in ("a dead block", "nothing at all"):
        assert relative.max() < (0.8 if format.startswith("int2") else 0.3)


@each_solver
@some_formats
@pytest.mark.parametrize("scale", [1e-6, 300.0])
def test_weights_of_any_size(solver: str, format: str, scale: float) -> None:
    w, seen = weight(scale=scale), stats(inputs())
    ours = solved(solver, format, w, seen).dense()
    assert torch.isfinite(ours).all()
    nearest = solved("rtn", format, w, seen).dense()
    assert not_above(errors(w, ours, seen.hessian), errors(w, nearest, seen.hessian))


@pytest.mark.parametrize("solver", SWEEPS)
@some_formats
def test_feedback_is_worth_something_on_correlated_inputs(solver: str, format: str) -> None:
    w, seen = weight(), stats(inputs())
    ours = errors(w, solved(solver, format, w, seen).dense(), seen.hessian)
    nearest = errors(w, solved("rtn", format, w, seen).dense(), seen.hessian)
    assert ours.sum() < 0.75 * nearest.sum()


@each_solver
@some_formats
@pytest.mark.parametrize("diagonal", ["identity", "uneven"])
def test_with_independent_inputs_every_code_is_the_nearest(
    solver: str, format: str, diagonal: str
) -> None:
    """Nothing makes up for anything: no other codes on the same grid are better."""
    w = weight()
    d = torch.ones(N) if diagonal == "identity" else torch.exp(torch.randn(N, generator=draw(5)))
    found = solved(solver, format, w, Stats(9, torch.diag(d)))
    _, grid = found.format.unpack(found.parts, found.shape)
    nearest = found.format.decode(found.format.encode(w, grid), grid)
    assert torch.allclose(
        ((w - found.dense()).square() * d).sum(1), ((w - nearest).square() * d).sum(1), rtol=1e-5
    )


@pytest.mark.parametrize("solver", SWEEPS)
@pytest.mark.parametrize(
    ("format", "n"), [("int2_channel", 4), ("int2_channel", 6), ("int3_channel_sym", 4)]
)
def test_near_the_best_of_all_codes(solver: str, format: str, n: int) -> None:
    """Against every code there is on the same grid: within 15 % on the average, often equal."""
    fmt = formats[format]
    every = torch.tensor(
        list(itertools.product(range(2**fmt.code_bits), repeat=n)), dtype=torch.uint8
    )
    ratios, exact = [], 0
    for seed in range(16):
        seen = stats(inputs(n=n, seed=seed)[:50])
        w = weight(1, n, 1.0, seed)
        found = solved(solver, format, w, seen)
        _, grid = fmt.unpack(found.parts, found.shape)
        dense = fmt.decode(every, {k: g.expand(len(every), -1) for k, g in grid.items()})
        best = errors(w, dense, seen.hessian).min()
        ours = errors(w, found.dense(), seen.hessian)[0]
        ratios.append(float(ours / best))
        exact += ratios[-1] < 1 + 1e-6
    assert min(ratios) > 1 - 1e-6
    assert sum(ratios) / len(ratios) < 1.15
    assert exact >= 10


@each_solver
@pytest.mark.parametrize("format", FORMATS)
def test_dense_is_what_the_format_decodes(solver: str, format: str) -> None:
    w, fmt = weight(3), formats[format]
    found = solved(solver, format, w, stats(inputs()))
    codes, grid = fmt.unpack(found.parts, (3, N))
    assert torch.equal(found.dense(), fmt.decode(codes, grid))
    assert found.nbytes() == 3 * round(fmt.bits(N) * N / 8)
    assert found.shape == (3, N)
    assert found.spec.format == format
    assert found.format is fmt
    turned = found.rows(torch.tensor([2, 0, 1]))
    assert torch.equal(turned.dense(), found.dense()[[2, 0, 1]])


@each_solver
@some_formats
def test_the_same_call_gives_the_same_bytes(solver: str, format: str) -> None:
    w, seen = weight(), stats(inputs())
    before = w.clone(), seen.hessian.clone()
    first, second = solved(solver, format, w, seen), solved(solver, format, w, seen)
    assert first.parts.keys() == second.parts.keys()
    assert all(torch.equal(first.parts[k], second.parts[k]) for k in first.parts)
    assert torch.equal(w, before[0])  # what was given is left as it was
    assert torch.equal(seen.hessian, before[1])


@each_solver
@some_formats
def test_rows_do_not_know_of_each_other(solver: str, format: str) -> None:
    """Solved stacked or apart: the same but for ties that sums in another order break."""
    w, seen = weight(12), stats(inputs())
    together = solved(solver, format, w, seen).dense()
    apart = torch.cat([solved(solver, format, part, seen).dense() for part in w.split([1, 7, 4])])
    same = torch.isclose(together, apart, rtol=1e-5, atol=0).all(1)
    assert same.sum() >= 10
    ours, theirs = errors(w, together, seen.hessian), errors(w, apart, seen.hessian)
    assert torch.allclose(ours, theirs, rtol=0.05)


@each_solver
@some_formats
def test_without_stats_every_column_counts_the_same(solver: str, format: str) -> None:
    w = weight()
    bare = solved(solver, format, w, None).dense()
    even = solved("rtn", format, w, Stats(1, torch.eye(N))).dense()
    assert torch.equal(bare, even)


@each_solver
@pytest.mark.parametrize("format", [*SOME, "f16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(solver: str, format: str, value: float) -> None:
    w = weight()
    w[2, 5] = value
    with pytest.raises(BadInput, match=r"NaN|infinite"):
        solved(solver, format, w, stats(inputs()))


@each_solver
@some_formats
def test_inputs_that_are_no_numbers_are_refused(solver: str, format: str) -> None:
    hessian = torch.eye(N)
    hessian[3, 3] = float("nan")
    with pytest.raises(BadInput, match=r"must be finite|NaN"):
        solved(solver, format, weight(), Stats(9, hessian))
