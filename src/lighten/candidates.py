"""What could be done to each layer, what it costs in bytes and, predicted, in nats.

No sweep is run here. A sweep's error is known beforehand, in expectation, from the factor of H:
fit a format with importance 1 / diag(U)² and sum the squared rounding errors with that weight
(within some per cent of what the sweep then reaches, see tests/unit/test_candidates.py). Sparse
formats choose what goes by the same weight, on weights that no sweep has corrected: that is right
within a factor of two, too much at low sparsity and too little at high. (Pruning ResNet-20 in one
sweep without what follows it in `obs` predicts no better.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lighten.run import Run
from lighten.sparse import format_of
from lighten.sweep import Factor
from lighten.types import Candidate, Layer, Spec, Stats

SAMPLE_ROWS = 256


def candidates(
    layer: Layer,
    weight: Tensor,
    stats: Stats,
    specs: Sequence[Spec],
    nbytes: Mapping[str, int],
    factor: Factor | None = None,
    rounds: Mapping[str, int | None] | None = None,
) -> list[Candidate]:
    """One candidate per spec; error in nats of KL divergence per token (lighten.sensitivity).

    weight: (out, in). nbytes: spec as text -> bytes in the exported file. rounds: spec as text ->
    how many inputs share a scale where the runtime rounds them (Exporter.rounds_inputs): what that
    costs counts too, for no choice of codes can mend it. Large matrices are judged by an even
    sample of their rows.
    """
    importance = (factor or Factor.of(stats.hessian)).importance
    rows = _sample(weight.shape[0], weight.device)
    part = weight[rows]
    minds, total = _row_weights(stats, rows, weight.shape[0])
    found = []
    for spec in specs:
        error = 0.0
        if spec.format is not None or spec.sparsity is not None:
            fmt = format_of(spec)
            grid = fmt.fit(part, importance)
            delta = part - fmt.decode(fmt.encode(part, grid), grid)
            per_row = (delta.square() * importance).sum(1)
            error = 0.5 * total * float((per_row * minds).sum() / minds.sum())
        block = (rounds or {}).get(str(spec))
        if block and stats.peaks and block in stats.peaks:
            per_row = part.square() @ _rounding(stats.peaks[block], block, part)
            error += 0.5 * total * float((per_row * minds).sum() / minds.sum())
        cost = {"bytes": float(nbytes[str(spec)])}
        found.append(Candidate(layer.name, {layer.name: str(spec)}, error, cost))
    return found


def _rounding(peaks: Tensor, block: int, like: Tensor) -> Tensor:
    """(in,): mean square error of inputs rounded to -127..127 times their block's peak / 127."""
    return (peaks.to(like) / (127**2 * 12)).repeat_interleave(block)


def _sample(rows: int, device: torch.device) -> Tensor:
    count = min(rows, SAMPLE_ROWS)
    return torch.linspace(0, rows - 1, count, device=device).long()


def _row_weights(stats: Stats, rows: Tensor, count: int) -> tuple[Tensor, float]:
    """How much the network minds each sampled row, and the sum over all rows."""
    minds = stats.gradient if stats.gradient is not None else stats.frequency
    if minds is None:
        minds = torch.ones(count, device=rows.device)
    sampled = minds.to(rows.device)[rows].clamp(min=1e-30)
    return sampled, float(minds.sum())


def stored_candidates(run: Run) -> list[Candidate]:
    """The candidates of a run, as far as they are stored."""
    rows = run.read("candidates")
    return [Candidate(r["unit"], r["specs"], r["error"], r["cost"], r.get("width")) for r in rows]


def as_row(candidate: Candidate) -> dict[str, Any]:
    """A candidate as it is stored."""
    row = {"unit": candidate.unit, "specs": dict(candidate.specs), "error": candidate.error}
    return row | {"cost": dict(candidate.cost)}
