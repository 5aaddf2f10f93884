"""Pruning with error feedback: what goes is made up for by what stays; then rounding, likewise.

    sweep (choose and correct) -> least squares on what stays -> exchange, twice -> the kept weights
    swept again on the format's scales -> descent towards the dense weight

*Source:* Frantar and Alistarh 2023, "SparseGPT"; Hassibi and Stork 1993, "Optimal brain surgeon".
Different here: which weights go is decided over all columns that are left, not block by block, and
weights are exchanged afterwards. Pruning and rounding in one sweep is possible too, and measured
10 to 20 per cent worse for int4: a sweep cannot take back what it has dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lighten.checked import finite
from lighten.errors import WrongUse
from lighten.exchange import exchange
from lighten.registry import formats, solvers
from lighten.sparse import Above, Given, Pattern, Sparse
from lighten.sweep import Factor, descend, row_errors, sweep
from lighten.types import Compressed, Spec, Stats

PASSES = 6
ROUNDS = 2
"""Of exchange and least squares. The first wins most, a third nearly nothing."""


@solvers("obs")
def obs(
    weight: Tensor, stats: Stats | None, spec: Spec, factor: Factor | None = None
) -> Compressed:
    """weight (out, in) -> sparse codes with low tr(Δ H Δᵀ), never above magnitude and wanda.

    factor: of stats.hessian, if it is at hand. Without stats it is magnitude; without sparsity it
    is gptq. Raises WrongUse for a threshold, which says nothing of what a weight costs.
    """
    if spec.sparsity is None:
        rounded: Compressed = solvers["gptq"](weight, stats, spec, factor)
        return rounded
    fmt = Sparse.of(spec)
    if isinstance(fmt.pattern, Above):
        raise WrongUse(
            f"`{spec}` gives a threshold, and obs goes by the error that a weight's removal makes",
            "give a share, or use @magnitude",
        )
    if stats is None:
        plain: Compressed = solvers["magnitude"](weight, stats, spec)
        return plain
    finite(fmt.name, weight)
    factor = factor or Factor.of(stats.hessian)
    best = _stored(weight, factor, fmt, *_prune(weight, factor, fmt.pattern), spec)
    error = _error(weight, best, stats)
    for name in ("magnitude", "wanda"):
        plain = solvers[name](weight, stats, spec)
        if _error(weight, plain, stats) < error:
            best, error = plain, _error(weight, plain, stats)
    return best


def _prune(w: Tensor, factor: Factor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Float weights (out, in), zero where they go, and what stays (out, in) bool."""
    plain = formats["f32"]
    q, grid = sweep(w, factor, plain, pattern)
    q, grid = descend(w, factor.hessian, plain, q, grid, PASSES)
    kept = grid["mask"]
    for _ in range(ROUNDS):
        q, kept = exchange(w, factor.hessian, q * kept, kept, pattern, 16 + w.shape[1] // 16)
        q, _ = descend(w, factor.hessian, plain, q, {"mask": kept}, PASSES)
    return q * kept, kept


def _stored(
    w: Tensor, factor: Factor, fmt: Sparse, q: Tensor, kept: Tensor, spec: Spec
) -> Compressed:
    """q in the format, its rounding errors made up for by what stays."""
    codes, grid = sweep(q, factor, fmt.base, Given(kept))
    codes, grid = descend(w, factor.hessian, fmt.base, codes, grid, PASSES)
    return fmt.compressed(codes, grid, spec)


def _error(w: Tensor, weight: Compressed, stats: Stats) -> float:
    return float(row_errors(w, weight.dense(), stats.hessian).sum(dtype=torch.float64))
