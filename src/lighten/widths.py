"""How wide each axis: the curves of what widths lose, spent within a budget."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lighten.decide import Decision, Term, decide
from lighten.errors import ImpossibleBudget
from lighten.types import Axis

MOST_OPTIONS = 48
"""Widths of an axis that are looked at; of more, evenly spread ones."""


@dataclass(frozen=True, eq=False)
class Curve:
    """What an axis loses when it is narrowed.

    order: (width,) units, the first to be removed first. error: (width + 1,) what is lost with so
    many units kept, in nats of KL where the pass that made it says so; inf where impossible.
    """

    order: Tensor
    error: Tensor

    def kept(self, width: int) -> Tensor:
        """(width,) the units that stay, sorted."""
        return self.order[len(self.order) - width :].sort().values


def branches(axes: Iterable[Axis]) -> list[Axis]:
    """The axes that one weight alone writes: those inside a branch, not a stream that branches add
    to. What a stream loses grows with every branch that reads it, more than its curve says."""
    return [a for a in axes if sum(m.role == "writes" for m in a.members) == 1]


def options(axis: Axis, curve: Curve, multiple: int = 1, hold: bool = False) -> Decision:
    """The widths that an axis may have: multiples of `multiple`, and its own; held: only that."""
    widths = [
        w
        for w in range(axis.width)
        if not hold and w % multiple == 0 and bool(torch.isfinite(curve.error[w]))
    ]
    if len(widths) > MOST_OPTIONS:
        picks = torch.linspace(0, len(widths) - 1, MOST_OPTIONS).round().long().tolist()
        widths = [widths[i] for i in picks]
    # a curve that falls when units go is noise: what is kept can always be set to what was removed
    error = curve.error.flip(0).cummax(0).values.flip(0)
    widths.append(axis.width)
    return Decision(axis.name, tuple(widths), tuple(float(error[w]) for w in widths))


def decisions(
    axes: Iterable[Axis],
    curves: Mapping[str, Curve],
    multiple: int = 1,
    held: Collection[str] = (),
) -> list[Decision]:
    """What there is to decide: the widths of every axis that is free and has a curve."""
    free = [a for a in axes if a.name in curves and a.locked is None]
    return [options(a, curves[a.name], multiple, a.name in held) for a in free]


def spend(
    axes: Iterable[Axis],
    curves: Mapping[str, Curve],
    terms: Sequence[Term],
    limit: float,
    fixed: float = 0.0,
    multiple: int = 1,
    held: Collection[str] = (),
) -> dict[str, int]:
    """Axis -> width: the least loss found within the limit; raises ImpossibleBudget.

    held: axes that keep their width.
    """
    return decide(decisions(axes, curves, multiple, held), terms, limit, fixed)


def uniform(
    axes: Iterable[Axis],
    curves: Mapping[str, Curve],
    terms: Sequence[Term],
    limit: float,
    fixed: float = 0.0,
    multiple: int = 1,
    held: Collection[str] = (),
) -> dict[str, int]:
    """The plain baseline: the same share of every axis, the largest that fits."""
    every = decisions(axes, curves, multiple, held)
    low, high, best = 0.0, 1.0, None
    for _ in range(24):
        share = (low + high) / 2
        widths = {decision.name: _nearest(decision, share) for decision in every}
        if fixed + sum(t.cost(widths) for t in terms) <= limit:
            low, best = share, widths
        else:
            high = share
    if best is None:
        widths = {decision.name: _nearest(decision, 0.0) for decision in every}
        least = fixed + sum(t.cost(widths) for t in terms)
        raise ImpossibleBudget(f"no uniform width costs {limit:,.4g} or less", "allow more", least)
    return best


def at_share(
    axes: Iterable[Axis], curves: Mapping[str, Curve], share: float, multiple: int = 1
) -> dict[str, int]:
    """Axis -> width: at most this share of each, its least possible width where that is more."""
    free = [a for a in axes if a.name in curves and a.locked is None]
    return {a.name: _nearest(options(a, curves[a.name], multiple), share) for a in free}


def keep_of(curves: Mapping[str, Curve], widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Axis -> its kept units, for the axes that are narrowed."""
    return {
        name: curves[name].kept(width)
        for name, width in widths.items()
        if width < len(curves[name].order)
    }


def _nearest(decision: Decision, share: float) -> int:
    """The widest option that is at most a share of the whole; the narrowest if none is."""
    full = decision.values[-1]
    fits = [w for w in decision.values if w <= share * full + 1e-9]
    return int(max(fits, default=min(decision.values)))
