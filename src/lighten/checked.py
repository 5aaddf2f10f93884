"""What solvers and criteria check of what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lighten.errors import BadInput, WrongUse
from lighten.types import Stats

Criterion = Callable[[Tensor, "Stats | None"], Tensor]


def finite(who: str, weight: Tensor) -> Tensor:
    """The weight; raises BadInput where it holds NaN or infinity."""
    if not bool(torch.isfinite(weight).all()):
        raise BadInput(
            f"{who}: the weight has NaN or infinite entries", "mend the model, or keep the layer"
        )
    return weight


_SOURCES = {
    "hessian": "calibrate first: lighten.moments.hessians(network, data)",
    "slope": "collect gradients first: lighten.gradients.gradients(network, data)",
    "curvature": "collect gradients first: lighten.gradients.gradients(network, data)",
    "scale": "lighten.importance.scales(network) reads them; a weight without a norm has none",
}


def needed(who: str, stats: Stats | None, what: str) -> Tensor:
    """One field of stats; raises WrongUse where it is missing, BadInput where it is not finite."""
    found: Tensor | None = None if stats is None else getattr(stats, what)
    if found is None or not found.numel():
        raise WrongUse(f"criterion {who} needs `{what}` of the statistics", _SOURCES[what])
    if not bool(torch.isfinite(found).all()):
        raise BadInput(
            f"{who}: `{what}` has NaN or infinite entries", "does the model overflow on this data?"
        )
    return found


def by_group(weight: Tensor, hessian: Tensor, judge: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """judge(rows, H) of each group of rows where H is (groups, in, in), else of all at once."""
    hessian = hessian.to(weight)
    if hessian.dim() == 2:
        return judge(weight, hessian)
    rows = weight.chunk(len(hessian))
    return torch.cat([judge(r, h) for r, h in zip(rows, hessian, strict=True)])


def of_outputs(criterion: Any) -> Any:
    """Mark a criterion that judges a whole output (row): columns are not told apart by it."""
    criterion.outputs = True
    return criterion


def spread(per_output: Tensor, weight: Tensor) -> Tensor:
    """(out,) -> (out, in), each output's number in equal parts over its row."""
    return (per_output / weight.shape[1])[:, None].expand_as(weight)
