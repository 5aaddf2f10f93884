"""Rounding learned by gradient from where the sweep ends, then descent; never worse than gptq.

*Source:* Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization"; see
lighten.soft_rounding for what is done differently. In contrast to a sweep all weights are decided
together; in contrast to descent, two that must turn at once can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lighten.registry import formats, solvers
from lighten.soft_rounding import learn_codes
from lighten.sparse import pinned
from lighten.sweep import Factor, descend, row_errors
from lighten.types import Compressed, Spec, Stats

STEPS = 100
PASSES = 2


@solvers("learned")
def learned(
    weight: Tensor, stats: Stats | None, spec: Spec, factor: Factor | None = None,
    kept: Tensor | None = None,
) -> Compressed:  # fmt: skip
    """weight (out, in) -> what gptq gives, its codes turned by gradient where tr(Δ H Δᵀ) falls.

    Δ = weight - dense. Row by row the better of this and gptq is kept. factor: of stats.hessian, if
    it is at hand. kept: as gptq has it. Formats without scales, and calls without stats, are only
    rounded. With sparsity it is obs.
    """
    start: Compressed = solvers["gptq"](weight, stats, spec, factor, kept)
    fmt = formats[str(spec.format)]
    if stats is None or spec.sparsity is not None:
        return start
    codes, grid = fmt.unpack(start.parts, start.shape)
    if not grid:
        return start
    factor = factor or Factor.of(stats.hessian)
    h = factor.hessian
    turned = learn_codes(weight, lambda d: d @ h, h.diagonal(), fmt, codes, grid, STEPS)
    if kept is not None:
        turned, grid = torch.where(kept, turned, codes), grid | {"mask": kept}
    codes, grid = pinned(fmt, *descend(weight, h, fmt, turned, grid, PASSES))
    found = fmt.pack(codes, grid)
    ours = row_errors(weight, fmt.decode(codes, grid), stats.hessian)
    theirs = row_errors(weight, start.dense(), stats.hessian)
    better = (ours < theirs)[:, None]
    parts = {k: torch.where(better, t, start.parts[k]) for k, t in found.items()}
    return Compressed(spec, start.shape, fmt, parts)
