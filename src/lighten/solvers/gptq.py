"""Rounding with error feedback: sweep, then coordinate descent, never worse than round-to-nearest.

*Source:* Frantar et al. 2022, "GPTQ"; see lighten.sweep for what is done differently.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lighten.registry import formats, solvers
from lighten.sparse import Given, pinned
from lighten.sweep import Factor, descend, row_errors, sweep
from lighten.types import Compressed, Spec, Stats

PASSES = 3


@solvers("gptq")
def gptq(
    weight: Tensor, stats: Stats | None, spec: Spec, factor: Factor | None = None,
    kept: Tensor | None = None,
) -> Compressed:  # fmt: skip
    """weight (out, in) -> codes and scales by a sweep: low tr(Δ H Δᵀ), Δ = weight - dense.

    Row by row the better of this and round-to-nearest is kept. factor: of stats.hessian, if it is
    at hand. kept: (out, in) bool, of a weight that was pruned before: the others become what stands
    for 0. Formats without scales (f16, bf16, f32), and calls without stats, are only rounded.
    With sparsity the sweep prunes too: that is obs.
    """
    if spec.sparsity is not None:
        pruned: Compressed = solvers["obs"](weight, stats, spec, factor)
        return pruned
    pattern = None if kept is None else Given(kept)
    nearest: Compressed = solvers["rtn"](weight if kept is None else weight * kept, stats, spec)
    fmt = formats[str(spec.format)]
    _, grid0 = fmt.unpack(nearest.parts, nearest.shape)
    if not grid0 or stats is None:
        return nearest
    factor = factor or Factor.of(stats.hessian)
    codes, grid = sweep(weight, factor, fmt, pattern)
    codes, grid = descend(weight, factor.hessian, fmt, codes, grid, PASSES)
    codes, grid = pinned(fmt, codes, grid)
    swept = fmt.pack(codes, grid)
    ours = row_errors(weight, fmt.decode(codes, grid), stats.hessian)
    theirs = row_errors(weight, nearest.dense(), stats.hessian)
    keep = ours <= theirs
    if not bool(keep.all()):
        swept = {k: torch.where(keep[:, None], t, nearest.parts[k]) for k, t in swept.items()}
    return Compressed(spec, nearest.shape, fmt, swept)
