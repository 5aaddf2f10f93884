"""Drop the smallest weights (or those under a threshold), round the others; nothing makes up.

*Source:* Han et al. 2015, "Learning both weights and connections for efficient neural networks".
"""

from __future__ import annotations

from torch import Tensor

from lighten.registry import solvers
from lighten.sparse import Sparse, nearest
from lighten.types import Compressed, Spec, Stats


@solvers("magnitude")
def magnitude(weight: Tensor, stats: Stats | None, spec: Spec) -> Compressed:
    """weight (out, in) -> the largest |w| of all rows, rounded to nearest; rtn without sparsity."""
    if spec.sparsity is None:
        rounded: Compressed = solvers["rtn"](weight, stats, spec)
        return rounded
    fmt = Sparse.of(spec)
    return nearest(weight, fmt.pattern.choose(weight.abs()), fmt, stats, spec)
