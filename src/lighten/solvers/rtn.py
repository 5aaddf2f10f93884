"""Round to nearest, on scales searched with each column weighted by how much input it sees."""

from __future__ import annotations

import torch
from torch import Tensor

from lighten.errors import WrongUse
from lighten.registry import formats, solvers
from lighten.types import Compressed, Spec, Stats


@solvers("rtn")
def rtn(weight: Tensor, stats: Stats | None, spec: Spec) -> Compressed:
    """weight (out, in) -> the nearest codes; squared errors weighted by diag(H).

    Without stats (no calibration data) every column counts the same.
    """
    if spec.sparsity is not None:
        raise WrongUse(
            f"`{spec}`: rtn only rounds, it does not choose which weights go",
            "the solvers magnitude, wanda and obs do",
        )
    fmt = formats[str(spec.format)]
    importance = None if stats is None else stats.hessian.diagonal().clamp(min=0)
    if importance is not None and not torch.count_nonzero(importance):
        importance = None
    grid = fmt.fit(weight, importance)
    parts = fmt.pack(fmt.encode(weight, grid), grid)
    return Compressed(spec, (weight.shape[0], weight.shape[1]), fmt, parts)
