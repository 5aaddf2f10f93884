"""Make a network narrower until what it really costs meets the budget.

    spend = Spend(terms, fixed, actual)     # what widths are predicted to cost, and what they do
    found = narrow(job, spend, limit, spend_widths)

Predictions leave things out (attention's products, an exporter's overhead, a runtime's mood), so
the network is made, its cost is taken for real, and what is asked of the prediction next is read
off the line through the costs seen so far, until the real cost meets the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lighten.coupling import Couplings
from lighten.decide import Term
from lighten.errors import ImpossibleBudget
from lighten.network import Network
from lighten.shrink import shrink
from lighten.types import Axis
from lighten.widths import Curve, keep_of

TURNS = 6


@dataclass(frozen=True)
class Spend:
    """A cost: terms and fixed predict it from widths, actual takes it from a network.

    tolerance: how far below the budget the real cost may stay without another try, as a share.
    """

    terms: Sequence[Term]
    fixed: float
    actual: Callable[[Network], float]
    tolerance: float = 0.05

    def predicted(self, widths: Mapping[str, int]) -> float:
        return self.fixed + sum(term.cost(widths) for term in self.terms)


@dataclass(frozen=True, eq=False)
class Narrowed:
    """A smaller network, not compensated yet. widths: and what else was decided with them, such as
    formats of layers. cost: real, in the budget's unit."""

    network: Network
    widths: Mapping[str, Any]
    keep: Mapping[str, Tensor]
    cost: float


Chooser = Callable[[float], dict[str, int]]
"""A predicted cost -> widths that are predicted to cost no more (lighten.widths)."""


def narrow(
    network: Network,
    couplings: Couplings,
    curves: Mapping[str, Curve],
    spend: Spend,
    limit: float,
    choose: Chooser,
) -> Narrowed:
    """The network at the widths that `choose` finds, its real cost at most `limit`.

    Raises ImpossibleBudget where no widths come under it.
    """
    widths = {axis.name: axis.width for axis in couplings.free}
    return meet(
        Narrowed(network, widths, {}, spend.actual(network)),
        lambda widths: at_widths(network, couplings, curves, spend, widths),
        spend.predicted, limit, choose, spend.tolerance,
    )  # fmt: skip


def meet(
    whole: Narrowed,
    make: Callable[[dict[str, Any]], Narrowed],
    predicted: Callable[[Mapping[str, Any]], float],
    limit: float,
    choose: Callable[[float], dict[str, Any]],
    tolerance: float,
) -> Narrowed:
    """What `make` makes of the values that `choose` finds, its real cost at most `limit`: the
    nearest to it that was seen, and at once one that is within `tolerance`, a share, of it.

    whole: what the search sets out from, whose cost teaches how far predictions are off. Raises
    ImpossibleBudget where nothing comes under the limit.
    """
    best = whole if whole.cost <= limit else None
    seen = [(predicted(whole.widths), whole.cost)]
    tried = set[tuple[tuple[str, Any], ...]]()
    for _ in range(TURNS):
        try:
            values = choose(_aim(seen, limit))
        except ImpossibleBudget as error:
            if best is not None or error.least is None:
                break
            # so little cannot be had by the prediction, which may be too high: the cheapest, then
            values = choose(error.least + 1e-9 * abs(error.least))
        key = tuple(sorted(values.items()))
        if key in tried:
            break
        tried.add(key)
        found = make(values)
        seen.append((predicted(values), found.cost))
        fits = found.cost <= limit
        if fits and (best is None or found.cost > best.cost):
            best = found
        if fits and found.cost >= (1 - tolerance) * limit:
            break
    if best is None:
        least = min(cost for _, cost in seen)
        raise ImpossibleBudget(
            f"{limit:,.4g} cannot be met: the least that was reached is {least:,.4g}",
            "allow more",
            least,
        )
    return best


def _aim(seen: Sequence[tuple[float, float]], limit: float) -> float:
    """The predicted cost whose real one is the limit, by the (predicted, real) ones seen so far."""
    below = max((pair for pair in seen if pair[1] <= limit), key=_real, default=None)
    above = sorted((pair for pair in seen if pair[1] > limit), key=_real)
    ends = [below, *above][:2] if below is not None else above[:2]
    if len(ends) == 2:
        (p, c), (q, d) = ends
        if (q - p) * (d - c) > 0:
            aimed = p + (limit - c) * (q - p) / (d - c)
            # a line that is continued beyond what was seen leads astray if it goes far
            return aimed if below is not None else max(aimed, 0.25 * p)
    # a prediction may be off as a whole, as the times of single operators are
    predicted, real = seen[-1]
    return predicted * limit / real


def _real(pair: tuple[float, float]) -> float:
    return pair[1]


def at_widths(
    network: Network,
    couplings: Couplings,
    curves: Mapping[str, Curve],
    spend: Spend,
    widths: Mapping[str, int],
) -> Narrowed:
    """The network at these widths, the units that the curves say kept."""
    keep = keep_of(curves, widths)
    small = shrink(network, couplings, keep) if keep else network
    return Narrowed(small, widths, keep, spend.actual(small))


def free(axes: Sequence[Axis], curves: Mapping[str, Curve]) -> list[Axis]:
    """The axes that may be narrowed."""
    return [a for a in axes if a.locked is None and a.name in curves]
