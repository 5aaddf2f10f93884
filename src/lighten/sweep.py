"""Rounding with feedback: the optimal-brain-surgeon sweep, and coordinate descent after it.

Both lower tr((W - Q) H (W - Q)ᵀ) over what a format can store. The sweep visits each column once,
rounds it and lets the columns to its right make up for the error; when it reaches a block it fits
the block's scales on the weights as corrected so far. Where weights are pruned, too, it chooses
what goes on the weights as corrected so far, and makes up for it likewise. The descent then visits
every code and every scale again and moves it to its best value while all others stand, so it never
raises the error.

*Source:* Frantar et al. 2022, "GPTQ", algorithm 1 (the sweep, there with fixed scales); Frantar and
Alistarh 2023, "SparseGPT", algorithm 1 (pruning in it); the descent is exact line search along each
coordinate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lighten.errors import BadInput
from lighten.sparse import Pattern, fit_kept
from lighten.types import Format, Grid

DAMP = 0.02
"""Added to the diagonal of H, times its mean. On held-out text 0.01 to 0.05 are alike and best."""


@dataclass(frozen=True)
class Factor:
    """What a sweep needs of H: made once for all layers that see the same input.

    hessian: (in, in), damped. upper: (in, in), upper Cholesky factor of its inverse.
    importance: (in,), 1 / diag(upper)²: what an error in a column costs once all columns to its
    right have made up for it as well as they can.
    """

    hessian: Tensor
    upper: Tensor
    importance: Tensor

    @classmethod
    def of(cls, hessian: Tensor, damp: float = DAMP) -> Factor:
        """Damp H and factorise; where H is near singular the damping grows until it succeeds.

        Raises BadInput where H is not finite.
        """
        if not bool(torch.isfinite(hessian).all()):
            raise BadInput(
                f"a layer's {hessian.shape[0]} inputs hold NaN or infinite values on this text",
                "the model overflows: is it damaged, or was it trained otherwise than it is run?",
            )
        mean = hessian.diagonal().mean().clamp(min=1e-12)
        eye = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
        while True:
            damped = hessian + damp * mean * eye
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                inverse = torch.cholesky_inverse(lower)
                upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
                if not failed:
                    return cls(damped, upper, upper.diagonal().square().reciprocal())
            damp *= 4


def row_errors(w: Tensor, q: Tensor, hessian: Tensor) -> Tensor:
    """(out,): (w - q) H (w - q)ᵀ for each row."""
    d = w - q
    return ((d @ hessian) * d).sum(1)


def sweep(
    w: Tensor, factor: Factor, fmt: Format, pattern: Pattern | None = None
) -> tuple[Tensor, Grid]:
    """Codes (out, in) and grid for w (out, in), each block's scales fitted as the sweep arrives.

    pattern: prune as well; then the grid has an entry "mask" (out, in), True for what stays.
    """
    w = _column_major(w)
    n, upper, importance = w.shape[1], factor.upper, factor.importance
    block = fmt.block or n
    kept = None if pattern is None else torch.ones_like(w, dtype=torch.bool)
    chunk = max(128, fmt.block) if fmt.block else 128
    grids: list[Grid] = []
    codes: list[Tensor] = []
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        errors = torch.zeros(stop - start, w.shape[0], dtype=w.dtype, device=w.device).T
        for i in range(start, stop, fmt.step):
            inside = i % block
            if kept is not None and pattern is not None and i % pattern.span == 0:
                _prune(w, importance, pattern, kept, i, 0 if inside else block)
            if inside == 0:
                span = slice(i, i + block)
                if kept is None:
                    grids.append(fmt.fit(w[:, span], importance[span]))
                else:
                    grids.append(fit_kept(fmt, w[:, span], kept[:, span], importance[span]))
            elif fmt.sub != fmt.block and inside % fmt.sub == 0:
                span = slice(i, i + fmt.sub)
                grids[-1] = fmt.refit(w[:, span], grids[-1], inside, importance[span])
            j = i + fmt.step
            code = fmt.encode(w[:, i:j], grids[-1], inside)
            error = w[:, i:j] - _decode(fmt, code, grids[-1], inside, kept, i)
            if fmt.step == 1:
                error /= upper[i, i]
            else:
                error = torch.linalg.solve_triangular(
                    upper[i:j, i:j], error, upper=True, left=False
                )
            w[:, j:stop].addmm_(error, upper[i:j, j:stop], alpha=-1)
            errors[:, i - start : j - start] = error
            codes.append(code)
        w[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    grid = {k: torch.cat([g[k] for g in grids], 1) for k in grids[0]}
    if kept is not None:
        grid["mask"] = kept.contiguous()
    return torch.cat(codes, 1), grid


def _prune(
    w: Tensor, importance: Tensor, pattern: Pattern, kept: Tensor, start: int, block: int
) -> None:
    """Decide, in place, what stays of the span at `start`; for a first guess, of all the block.

    A block's scales are fitted before the sweep has corrected all of its weights.
    """
    stop = start + -(-max(block, pattern.span) // pattern.span) * pattern.span
    look = w[:, start:] if pattern.far else w[:, start:stop]
    score = look.square() * importance[start : start + look.shape[1]]
    kept[:, start:stop] = pattern.choose(score, kept[:, :start])[:, : stop - start]


def _decode(
    fmt: Format, codes: Tensor, grid: Grid, start: int, kept: Tensor | None, at: int
) -> Tensor:
    """What the codes of columns at.. stand for, zero where they do not stay. start: in the grid."""
    q = fmt.decode(codes, grid, start)
    return q if kept is None else q * kept[:, at : at + codes.shape[1]]


def descend(
    w: Tensor,
    hessian: Tensor,
    fmt: Format,
    codes: Tensor,
    grid: Grid,
    passes: int,
    pull: Tensor | None = None,
) -> tuple[Tensor, Grid]:
    """Better codes and grid, by exact line search along every scale and every code in turn.

    hessian: (in, in), or (out, in, in), one for each row. pull: (out, in), half the negative
    gradient of the error where the codes are now; None: (w - q) H, q what they stand for.
    What does not stay (grid entry "mask", see sweep) is zero and does not move.
    """
    if fmt.step != 1:
        return codes, grid
    mask = grid.get("mask")
    kept = None if mask is None else _column_major(mask)
    grid = {k: g.clone() for k, g in grid.items() if k != "mask"}
    q = _column_major(_decode(fmt, codes, grid, 0, kept, 0))
    codes = _column_major(codes)
    pull = _column_major(_times(w - q, hessian) if pull is None else pull)
    n = w.shape[1]
    width = (fmt.block or n) if grid else 128
    for _ in range(passes):
        for start in range(0, n, width):
            span = slice(start, start + width)
            b = start // width
            part = {k: g[:, b : b + 1] for k, g in grid.items()}
            stay = None if kept is None else kept[:, span]
            moved = _descend_block(fmt, codes[:, span], part, q[:, span], pull[:, span],
                                   hessian[..., span, span], stay)  # fmt: skip
            _follow(pull[:, :start], moved, hessian[..., span, :start])
            _follow(pull[:, start + width :], moved, hessian[..., span, start + width :])
    return codes.contiguous(), grid if mask is None else grid | {"mask": mask}


def _column_major(t: Tensor) -> Tensor:
    """A copy whose columns are contiguous: all work here is on one column of all rows at a time."""
    return t.T.clone(memory_format=torch.contiguous_format).T


def _descend_block(
    fmt: Format, codes: Tensor, grid: Grid, q: Tensor, pull: Tensor, h: Tensor, kept: Tensor | None
) -> Tensor:
    """One pass over a block; changes all but h in place. Returns by how much q has moved."""
    before = q.clone()
    width = q.shape[1]
    for name, entry in grid.items():
        if entry.dim() == 2:
            _move_scale(fmt, codes, grid, name, entry[:, 0], 0, q, pull, h, kept)
    sub = fmt.sub if fmt.sub > 1 else 64  # longer blocks are visited in pieces that fit the cache
    for i, start in enumerate(range(0, width, sub)):
        span = slice(start, min(start + sub, width))
        part, hs = (codes[:, span], q[:, span], pull[:, span]), h[..., span, span]
        was = part[1].clone()
        local = part[2].clone()
        for name, entry in grid.items():
            if entry.dim() == 3:
                stay = None if kept is None else kept[:, span]
                _move_scale(fmt, part[0], grid, name, entry[:, 0, i], start, part[1], local, hs,
                            stay)  # fmt: skip
        diagonal = hs.diagonal(dim1=-2, dim2=-1)
        own: Any = diagonal.tolist() if hs.dim() == 2 else diagonal.T[..., None]
        for j in range(part[1].shape[1]):
            target = part[1][:, j : j + 1] + local[:, j : j + 1] / own[j]
            code = fmt.encode(target, grid, start + j)
            new = _decode(fmt, code, grid, start + j, kept, start + j)
            _follow(local, new - part[1][:, j : j + 1], hs[..., j : j + 1, :])
            part[1][:, j : j + 1] = new
            part[0][:, j : j + 1] = code
        _follow(pull, part[1] - was, h[..., span, :])
    return q - before


def _move_scale(
    fmt: Format, codes: Tensor, grid: Grid, name: str, entry: Tensor, start: int,
    q: Tensor, pull: Tensor, h: Tensor, kept: Tensor | None,
) -> None:  # fmt: skip
    """Put one entry (out,) of the grid on its best storable value; decode is linear in each."""
    old = entry.clone()
    entry.fill_(0)
    base = _decode(fmt, codes, grid, start, kept, 0)
    entry.fill_(1)
    slope = _decode(fmt, codes, grid, start, kept, 0) - base
    curvature = (_times(slope, h) * slope).sum(1)
    step = (slope * pull).sum(1) / curvature
    entry.copy_(fmt.settle(name, torch.where(curvature > 0, old + step, old)))
    new = _decode(fmt, codes, grid, start, kept, 0)
    _follow(pull, new - q, h)
    q.copy_(new)


def _times(v: Tensor, h: Tensor) -> Tensor:
    """v (out, k) times h (k, n), or each row times its own of h (out, k, n)."""
    return v @ h if h.dim() == 2 else (v[:, None] @ h)[:, 0]


def _follow(pull: Tensor, moved: Tensor, h: Tensor) -> None:
    """What is left of the pull (out, n) after some columns have moved (out, k); h: their rows."""
    if h.dim() == 2:
        pull.addmm_(moved, h, alpha=-1)
    elif h.shape[1] == 1:
        pull.sub_(moved * h[:, 0])
    else:
        pull.sub_(_times(moved, h))
