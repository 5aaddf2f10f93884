"""Codes and scales of a language model's head chosen again, each row where its token is likely.

The plan's solver weighs errors of all rows by the same inputs, those of every position. But a row
of the head only counts where its token has a chance, and what the last hidden states are there is
its own matter. For an error δ of row v the KL divergence from the original grows by

    ½ Σ_t p_tv (1 - p_tv) (δ h_t)²

h_t being what the head is given at position t, and p_tv the chance of token v there. So each row
gets a Hessian of its own, and is moved by exact line search along its scales and codes
(lighten.sweep.descend), the gradient where it stands being that of the true divergence. Where the
matrix is the embedding too, what a row's error costs at the input of the first block is added, as
often as the token was read.

In memory: what the head is given at every position, the head's gradient, and Hessians of some rows.

*Source:* Hassibi and Stork 1993 (optimal brain surgeon), with the Fisher matrix of a softmax.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lighten.block_metric import RIDGE
from lighten.blockwise import held_quarter
from lighten.calibrate import Stream
from lighten.devices import best_precision
from lighten.divergence import Head, compare
from lighten.measure import head_of
from lighten.progress import stage
from lighten.sweep import DAMP, descend
from lighten.types import Compressed

PASSES = 2
NEAR = 1e-3
"""p (1 - p) from which a position counts in a row's own Hessian; below, it counts as any other."""

PRIOR = 3.0
"""Positions of the usual kind that each row is taken to have been seen at besides."""

LEAST = 0.3
"""Sum of p (1 - p) without which nothing is known of a row: it stays as it is."""

MEMORY = 2**27
"""Numbers that Hessians of rows may be at once: 512 MB."""

HELD_OUT = 16
"""Windows by which the whole is judged, at most."""

LOGITS, CACHED = 2**25, 2**19
"""Logits in a slice of positions, 128 MB or in bfloat16 half of that, of which three stand at once;
and in the part of them that stays in a processor's cache from pass to pass."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """The matrix's other use. fisher: (width, width), F of its outputs (lighten.block_metric).
    count: (rows,), how often each was read at the positions learned from, and at those held out."""

    fisher: Tensor
    count: tuple[Tensor, Tensor]


def learn_head(
    theirs: Stream, weight: Compressed, fisher: Tensor | None = None
) -> tuple[Compressed, dict[str, float]]:
    """The weight with rows moved, and {"before", "after", "seconds"}: nats per token on held-out
    windows (a quarter, at most HELD_OUT); where the whole is no better there it is as it was.

    theirs: the original's stream behind its last block. fisher: F at the input of the first block,
    where the weight is the embedding too. The format has to encode columns one by one.
    """
    began = time.monotonic()
    held = held_quarter(len(theirs.hidden), HELD_OUT)
    hidden = torch.stack([h.cpu() for h in theirs.outputs()])
    learned, judged = hidden[~held].flatten(0, 1), hidden[held].flatten(0, 1)
    original, bias = theirs.head
    head = head_of(theirs.model, original, bias)
    other = None
    if fisher is not None:
        rows = [theirs.windows[~held], theirs.windows[held]]
        scale = getattr(theirs.module.get_input_embeddings(), "embed_scale", None)  # type: ignore[operator]
        fisher = fisher * (1.0 if scale is None else float(scale) ** 2)  # Gemma multiplies
        fisher = fisher + torch.diag(RIDGE * fisher.diagonal())
        counts = [torch.bincount(r.flatten().cpu(), minlength=len(original)) for r in rows]
        other = Embedding(fisher, (counts[0].float(), counts[1].float()))
    first = _cost(judged, head, weight.dense(), other)
    moved = _moved(learned, head, weight, other)
    last = _cost(judged, head, moved.dense(), other)
    facts = {"before": first, "after": min(first, last), "seconds": time.monotonic() - began}
    return (moved if last < first else weight), facts


def _cost(hidden: Tensor, head: Head, weight: Tensor, other: Embedding | None) -> float:
    """Nats per token of a head in place of the original's."""
    device = head.weight.device
    mine = Head(weight.to(device), head.bias, head.softcap, head.scale)
    targets, total = torch.zeros(1, dtype=torch.long), 0.0
    for part in torch.split(hidden.to(device), 512):
        found = compare(part, mine, part, head, targets.expand(len(part)).to(device))
        assert found.kld is not None
        total += float(found.kld.sum())
    if other is not None:
        error = weight.to(device) - head.weight.float()
        fisher = other.fisher.to(device)
        total += float((((error @ fisher) * error).sum(1).cpu() * other.count[1]).sum()) / 2
    return total / len(hidden)


@dataclass(frozen=True, eq=False)
class _Rows:
    """gradient: (rows, width), of Σ_t KL. mass: (rows,), Σ_t p (1 - p), and `far` what of it lies
    at positions below NEAR. at[start[v] : start[v + 1]] are the other positions of row v, and
    value[...] their p (1 - p)."""

    gradient: Tensor
    mass: Tensor
    far: Tensor
    start: Tensor
    at: Tensor
    value: Tensor


def _rows(hidden: Tensor, head: Head, weight: Tensor) -> _Rows:
    count, device = len(weight), head.weight.device
    gradient = torch.zeros(count, hidden.shape[1], device=device)
    mass, far = torch.zeros(count, device=device), torch.zeros(count, device=device)
    rows, at, values = list[Tensor](), list[Tensor](), list[Tensor]()
    size = max(1, LOGITS // count)
    halves = best_precision("auto", device.type) == "bf16-mixed"
    dtype = torch.bfloat16 if halves else torch.float32
    original = head.weight.to(dtype).T
    # what the error moves is a product of its own: as a difference of logits bfloat16 loses it
    error = (weight.to(device) - head.weight.float()).to(dtype).T
    few = max(1, CACHED // count)
    with stage("where each token is likely", -(-len(hidden) // size), "slices") as tick:
        for first in range(0, len(hidden), size):
            h = hidden[first : first + size].to(device, dtype)
            z, moved = h @ original, h @ error
            slopes = torch.empty_like(z)
            for begin in range(0, len(h), few):
                part = slice(begin, begin + few)
                q = head.after(moved[part].float() + z[part], 0, count)
                p = head.after(z[part].float(), 0, count)
                slope = head.scale if head.softcap is None else _slope(p, head)
                p, q = p.softmax(1), q.softmax(1)
                slopes[part] = _times(q.sub_(p), slope)
                _times(_times(p.mul_(1 - p), slope), slope)
                where, row = (p > NEAR).nonzero(as_tuple=True)
                near = p[where, row]
                rows.append(row.int().cpu())
                at.append((where + (first + begin)).int().cpu())
                values.append(near.cpu())
                total = p.sum(0)
                mass += total
                far += total.index_add_(0, row, near, alpha=-1).clamp_min_(0)
            gradient += slopes.T @ h
            tick()
    row = torch.cat(rows)
    order = row.argsort(stable=True)
    start = torch.searchsorted(row[order], torch.arange(count + 1, dtype=torch.int32))
    return _Rows(gradient, mass, far, start, torch.cat(at)[order], torch.cat(values)[order])


def _times(x: Tensor, slope: Tensor | float) -> Tensor:
    """x times the slope, in its place; a pass over all logits that most heads do not need."""
    return x if isinstance(slope, float) and slope == 1.0 else x.mul_(slope)


def _slope(z: Tensor, head: Head) -> Tensor:
    """How a capped logit moves with what it was before."""
    assert head.softcap is not None
    return head.scale * (1 - (z / head.softcap).square())


def _moved(hidden: Tensor, head: Head, weight: Compressed, other: Embedding | None) -> Compressed:
    device, original = head.weight.device, head.weight.float()
    format = weight.format
    codes, grid = format.unpack({k: p.to(device) for k, p in weight.parts.items()}, weight.shape)
    codes, grid = codes.clone(), {k: g.clone() for k, g in grid.items()}
    now = format.decode(codes, grid)
    found = _rows(hidden, head, now)
    usual = (hidden.T @ hidden / len(hidden)).to(device)
    known = (found.mass > LEAST).nonzero().flatten()
    known = known[found.mass[known].argsort(descending=True, stable=True)]
    batch = max(1, MEMORY // original.shape[1] ** 2)
    with stage("move rows", -(-len(known) // batch), "batches") as tick:
        for rows in torch.split(known, batch):
            error = original[rows] - now[rows]
            hessian = _hessians(hidden, found, usual, rows)
            pull = PRIOR * (error @ usual) - found.gradient[rows]
            if other is not None:
                fisher, count = other.fisher.to(device), other.count[0].to(device)[rows, None]
                for own, times in zip(hessian, count[:, 0].tolist(), strict=True):
                    own.add_(fisher, alpha=times)
                pull += count * (error @ fisher)
            here = {k: g[rows] for k, g in grid.items()}
            best = descend(original[rows], hessian, format, codes[rows], here, PASSES, pull)
            codes[rows] = best[0]
            for name, g in best[1].items():
                grid[name][rows] = g
            tick()
    parts = {k: p.cpu() for k, p in format.pack(codes, grid).items()}
    return Compressed(weight.spec, weight.shape, format, parts)


def _hessians(hidden: Tensor, found: _Rows, usual: Tensor, rows: Tensor) -> Tensor:
    """(rows, width, width): Σ_t p (1 - p) h hᵀ of each, where far away as it is everywhere."""
    width = usual.shape[0]
    hessian = torch.empty(len(rows), width, width, device=usual.device)
    for i, row in enumerate(rows.tolist()):
        own = slice(int(found.start[row]), int(found.start[row + 1]))
        h = hidden[found.at[own]] * found.value[own, None].sqrt()
        h = h.to(usual.device)
        torch.addmm(usual * (found.far[row] + PRIOR), h.T, h, out=hessian[i])
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    diagonal += DAMP * diagonal.mean(1, keepdim=True)
    return hessian
