"""Rounding learned by gradient: neighbours, the relaxed variable, and what it wins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lighten.registry import formats, solvers
from lighten.rounding import Moments, rounded
from lighten.soft_rounding import exponent, learn_codes, neighbours, opened, openness
from lighten.sweep import row_errors
from lighten.types import Compressed, Spec, Stats

FORMATS = ["int4_channel_sym", "int2_g32", "q4_0", "q2_k", "q6_k", "iq4_nl", "iq4_xs"]


def correlated(n: int, seed: int = 0, positions: int = 400) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(positions, n, generator=g)
    return x @ (torch.eye(n) + 0.8 * n**-0.5 * torch.randn(n, n, generator=g))


def test_the_relaxed_variable_reaches_its_ends() -> None:
    h = torch.linspace(0.01, 0.99, 7)
    assert torch.allclose(openness(opened(h)), h, atol=1e-6)
    assert openness(torch.tensor([-9.0, 9.0])).tolist() == [0, 1]


def test_the_annealed_term_comes_late_and_sharpens() -> None:
    found = [exponent(i, 100) for i in (0, 19, 20, 60, 99)]
    assert found[:2] == [None, None]
    assert found[2] == pytest.approx(20)
    assert found[2] > found[3] > found[4] >= 2  # type: ignore[operator]


@pytest.mark.parametrize("format", FORMATS)
def test_a_neighbour_is_the_next_number_on_that_side(format: str) -> None:
    fmt = formats[format]
    w = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    grid = fmt.fit(w)
    codes = fmt.encode(w, grid)
    q = fmt.decode(codes, grid)
    every = torch.stack([
        fmt.decode(torch.full_like(codes, c), grid) for c in range(int(codes.max()) + 2)
        if c <= int(fmt.encode(w.abs() * 1e6, grid).max())
    ])  # fmt: skip
    for side in (1, -1):
        other, value = neighbours(fmt, codes, grid, q + side * 1e3)
        beyond = torch.where(side * (every - q) > 0, side * (every - q), torch.inf).amin(0)
        want = torch.where(torch.isinf(beyond), q, q + side * beyond)
        assert torch.allclose(value, want, atol=1e-5)
        assert torch.equal(value, fmt.decode(other, grid))


@pytest.mark.parametrize("format", FORMATS)
def test_it_wins_something_over_gptq(format: str) -> None:
    x = correlated(256)
    stats = Stats(len(x), x.T @ x / len(x))
    w = torch.randn(24, 256, generator=torch.Generator().manual_seed(1))
    ours, theirs = (
        row_errors(w, solvers[name](w, stats, Spec(format)).dense(), stats.hessian)
        for name in ("learned", "gptq")
    )
    assert bool((ours <= theirs * (1 + 1e-5)).all())
    assert float(ours.sum()) < 0.99 * float(theirs.sum())


def test_steps_of_nothing_are_harmless() -> None:
    fmt = formats["int4_channel_sym"]
    w = torch.randn(3, 16)
    grid = fmt.fit(w)
    codes = fmt.encode(w, grid)
    none = learn_codes(w, torch.zeros_like, torch.zeros(16), fmt, codes, grid, 20)
    assert torch.equal(none, codes)


def test_groups_of_a_convolution_are_never_worse_and_some_are_better() -> None:
    torch.manual_seed(0)
    groups, rows, n = 12, 2, 9
    x = torch.stack([correlated(n, i, 80).T for i in range(groups)])
    zero = torch.zeros(groups, rows)
    m = Moments(80, 0 * x.sum(2), zero, x @ x.transpose(1, 2), torch.zeros(groups, rows, n), zero)
    w = torch.randn(groups, rows, n)

    def error(solver: str) -> Tensor:
        code: Compressed = rounded(m, w, Spec("int4_channel_sym", solver=solver))
        d = w - code.dense().view_as(w)
        return torch.einsum("gri,gij,grj->gr", d, m.xx / m.n, d)

    ours, theirs = error("learned"), error("gptq")
    assert bool((ours <= theirs * (1 + 1e-5)).all())
    assert float(ours.sum()) < float(theirs.sum())
