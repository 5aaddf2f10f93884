"""What candidates predict, against what the sweep then reaches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lighten.candidates import SAMPLE_ROWS, candidates
from lighten.registry import formats, solvers
from lighten.sweep import Factor, sweep
from lighten.types import Candidate, Layer, Spec, Stats

N = 256
FORMATS = ["int2_g32_sym", "int3_channel", "int4_g64", "iq4_nl", "q2_k", "q4_0", "q4_k", "q8_0"]


def inputs(seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(600, N, generator=g)
    x = x @ (torch.eye(N) + 0.05 * torch.randn(N, N, generator=g))
    return x * torch.exp(torch.randn(N, generator=g))


def weight(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, N, generator=torch.Generator().manual_seed(seed)) * 0.05


def predicted(w: Tensor, stats: Stats, names: list[str]) -> dict[str, Candidate]:
    specs = [Spec(format=name, solver="gptq") for name in names]
    layer = Layer("a.weight", "linear", (w.shape[0], N))
    sizes = {str(spec): 100 + i for i, spec in enumerate(specs)}
    found = candidates(layer, w, stats, specs, sizes)
    assert [c.specs for c in found] == [{"a.weight": str(spec)} for spec in specs]
    assert [c.cost for c in found] == [{"bytes": 100.0 + i} for i in range(len(specs))]
    return dict(zip(names, found, strict=True))


def half_error(w: Tensor, q: Tensor, h: Tensor, minds: Tensor | None = None) -> float:
    d = w - q
    rows = ((d @ h) * d).sum(1)
    return 0.5 * float((rows if minds is None else rows * minds).sum())


@pytest.mark.parametrize("seed", [0, 1])
def test_the_sweep_reaches_what_was_predicted(seed: int) -> None:
    x, w = inputs(seed), weight(64)
    stats = Stats(len(x), x.T @ x / len(x))
    factor, found = Factor.of(stats.hessian), predicted(w, stats, FORMATS)
    beyond = []
    for name in FORMATS:
        fmt = formats[name]
        codes, grid = sweep(w, factor, fmt)
        reached = half_error(w, fmt.decode(codes, grid), factor.hessian)
        assert 0.7 < found[name].error / reached < 1.15, name
        solved = solvers["gptq"](w, stats, Spec(format=name, solver="gptq")).dense()
        beyond.append(found[name].error / half_error(w, solved, stats.hessian))
    # the descent after the sweep gains about as much in every format, so it moves no choice
    assert min(beyond) > 0.6
    assert max(beyond) < 2.6
    assert max(beyond) / min(beyond) < 1.6


def test_what_is_kept_costs_nothing() -> None:
    x, w = inputs(), weight(8)
    layer, stats = Layer("a.weight", "linear", (8, N)), Stats(600, x.T @ x / 600)
    (kept,) = candidates(layer, w, stats, [Spec()], {"keep": 12345})
    assert kept == Candidate("a.weight", {"a.weight": "keep"}, 0.0, {"bytes": 12345.0})


@pytest.mark.parametrize("kind", ["gradient", "frequency"])
def test_rows_count_as_much_as_the_network_minds_them(kind: str) -> None:
    """Only rows that count are wrong or right: an error elsewhere costs nothing."""
    x, w = inputs(), weight(8)
    minds = torch.tensor([3.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0])
    stats = Stats(600, x.T @ x / 600, **{kind: minds})
    easy = torch.zeros(8, N)
    easy[[0, 2]] = w[[0, 2]]
    ours, same = (predicted(m, stats, ["q4_0"])["q4_0"].error for m in (w, easy))
    assert ours == pytest.approx(same, rel=1e-4)
    fmt, factor = formats["q4_0"], Factor.of(stats.hessian)
    codes, grid = sweep(w, factor, fmt)
    reached = half_error(w, fmt.decode(codes, grid), factor.hessian, minds)
    assert 0.6 < ours / reached < 1.4
    nobody = Stats(600, stats.hessian, **{kind: torch.zeros(8)})
    assert predicted(w, nobody, ["q4_0"])["q4_0"].error == 0


def test_a_tall_matrix_is_judged_by_a_sample_of_its_rows() -> None:
    x = inputs()
    w = weight(8 * SAMPLE_ROWS + 3)
    w *= torch.linspace(0.5, 2, len(w))[:, None]  # rows differ, along the matrix
    minds = torch.linspace(1, 3, len(w))
    stats = Stats(600, x.T @ x / 600, gradient=minds)
    sampled = predicted(w, stats, ["q4_0", "q2_k"])
    parts = w.split(SAMPLE_ROWS)
    for name in ("q4_0", "q2_k"):
        whole = sum(
            predicted(part, Stats(600, stats.hessian, gradient=m), [name])[name].error
            for part, m in zip(parts, minds.split(SAMPLE_ROWS), strict=True)
        )
        assert sampled[name].error == pytest.approx(whole, rel=0.1)


def test_more_bits_are_predicted_to_lose_less() -> None:
    x, w = inputs(), weight(32)
    found = predicted(w, Stats(600, x.T @ x / 600), ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "f16"])
    losses = [c.error for c in found.values()]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] > 0


@pytest.mark.parametrize("block", [32, 256])
def test_inputs_that_the_runtime_rounds_cost_what_rounding_them_does(block: int) -> None:
    x, w = inputs(), weight(16)
    parts = x.view(len(x), -1, block)
    peaks = parts.abs().amax(-1)
    stats = Stats(len(x), x.T @ x / len(x), peaks={block: peaks.square().mean(0)})
    layer, spec = Layer("a.weight", "linear", (16, N)), Spec(format="q8_0", solver="gptq")
    rounds: list[dict[str, int | None]] = [{str(spec): None}, {str(spec): block}]
    free, priced = (
        candidates(layer, w, stats, [spec], {str(spec): 1}, rounds=r)[0].error for r in rounds
    )
    step = (peaks / 127)[..., None]
    rounded = ((parts / step).round() * step).reshape(x.shape)
    measured = 0.5 * ((x - rounded) @ w.T).square().mean(0).sum()
    assert priced - free == pytest.approx(float(measured), rel=0.1)
