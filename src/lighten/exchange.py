"""A better choice of what stays: swaps of one weight that stays for one that went, row by row.

A sweep decides on each column once. Here, with all else standing, weight i goes and weight j comes
to its best value; the error tr((W - Q) H (W - Q)ᵀ) then changes by exactly

    2 q_i p_i + q_i² H_ii - (p_j + q_i H_ij)² / H_jj,     p = (w - q) H

and every row makes its best swap as long as that is below zero. How many stay in a row, or in each
group of a pattern n:m, does not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lighten.sparse import OfEach, Pattern

CANDIDATES = 24
"""Weights to remove and to add that a row considers at once."""


def exchange(
    w: Tensor, hessian: Tensor, q: Tensor, kept: Tensor, pattern: Pattern, swaps: int
) -> tuple[Tensor, Tensor]:
    """q (out, in) and what stays of it (out, in) bool after at most `swaps` swaps in each row.

    hessian: positive definite. The error never rises.
    """
    q, kept = q.clone(), kept.clone()
    pull = (w - q) @ hessian
    diagonal = hessian.diagonal()
    group = pattern.m if isinstance(pattern, OfEach) else q.shape[1]
    rows = torch.arange(len(w), device=w.device)
    for _ in range(swaps):
        loss = 2 * q[rows] * pull[rows] + q[rows].square() * diagonal
        gain = pull[rows].square() / diagonal
        out, into, change = _best_pairs(
            loss.masked_fill(~kept[rows], torch.inf), gain.masked_fill(kept[rows], -torch.inf),
            q[rows], pull[rows], hessian, group,
        )  # fmt: skip
        good = change < -1e-6 * loss.gather(1, out[:, None])[:, 0].abs()
        rows, out, into = rows[good], out[good], into[good]
        if not len(rows):
            break
        old = q[rows, out]
        pull[rows] += old[:, None] * hessian[out]
        new = pull[rows, into] / diagonal[into]
        pull[rows] -= new[:, None] * hessian[into]
        q[rows, out], q[rows, into] = 0.0, new
        kept[rows, out], kept[rows, into] = False, True
    return q, kept


def _best_pairs(
    loss: Tensor, gain: Tensor, q: Tensor, pull: Tensor, hessian: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: which goes, which comes, and by how much the error changes."""
    n = q.shape[1]
    if group < n:  # the pairs are those of one group: every (i, j) of each
        lanes = torch.arange(n, device=q.device).view(-1, group)
        i = lanes[:, :, None].expand(-1, -1, group).reshape(-1).expand(len(q), -1)
        j = lanes[:, None, :].expand(-1, group, -1).reshape(-1).expand(len(q), -1)
    else:
        count = min(CANDIDATES, n)
        first = loss.topk(count, largest=False).indices
        second = gain.topk(count).indices
        i = first[:, :, None].expand(-1, -1, count).flatten(1)
        j = second[:, None, :].expand(-1, count, -1).flatten(1)
    after = pull.gather(1, j) + q.gather(1, i) * hessian[i, j]
    change = loss.gather(1, i) - after.square() / hessian.diagonal()[j]
    change = change.masked_fill(gain.gather(1, j) == -torch.inf, torch.inf).nan_to_num(torch.inf)
    best, at = change.min(1)
    return i.gather(1, at[:, None])[:, 0], j.gather(1, at[:, None])[:, 0], best
