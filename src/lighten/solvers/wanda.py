"""Drop what multiplies little input, row by row, and round the others; nothing makes up.

*Source:* Sun et al. 2023, "A simple and effective pruning approach for large language models",
equation 1: score |w| * norm of its input, compared within each output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lighten.errors import WrongUse
from lighten.registry import solvers
from lighten.sparse import Above, Sparse, nearest
from lighten.types import Compressed, Spec, Stats


@solvers("wanda")
def wanda(weight: Tensor, stats: Stats | None, spec: Spec) -> Compressed:
    """weight (out, in) -> of each row the largest w² diag(H); rtn without sparsity.

    Without stats every column counts the same. Raises WrongUse for a threshold.
    """
    if spec.sparsity is None:
        rounded: Compressed = solvers["rtn"](weight, stats, spec)
        return rounded
    fmt = Sparse.of(spec)
    if isinstance(fmt.pattern, Above):
        raise WrongUse(f"`{spec}` gives a threshold, and wanda goes by rank", "use @magnitude")
    score = weight.square()
    if stats is not None:
        score = score * stats.hessian.diagonal().clamp(min=0)
    # ranks make rows alike: a share of all ranks is the same share of each row
    place = torch.arange(weight.shape[1], device=weight.device).expand_as(score)
    rank = torch.empty_like(place).scatter_(1, score.argsort(dim=1, stable=True), place)
    return nearest(weight, fmt.pattern.choose(rank), fmt, stats, spec)
