"""Structural pruning alone: fewer channels and heads within a budget, by any criterion.

found = lighten.prune(model, example_inputs, budget="0.5 macs", data=loader)
found.module            # smaller, and what it lost by least squares made up for
found.save("folder")    # lighten.load(factory, "folder") builds it again
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lighten import network_cost, saved
from lighten.batchnorms import Norms, better_norms
from lighten.compensate import compensate as make_up
from lighten.coupling import Couplings, couple
from lighten.curves import curves
from lighten.errors import ImpossibleBudget, UnknownName, WrongUse
from lighten.gradients import gradients, with_gradients
from lighten.importance import all_scores, scales
from lighten.moments import hessians
from lighten.network import Network
from lighten.progress import note, stage
from lighten.registry import criteria
from lighten.structure import Narrowed, free, narrow
from lighten.types import Axis, Budget
from lighten.widths import Curve, spend, uniform

GROUP_OBS = "group_obs"
"""The rise of the readers' error after they have made up for what goes; the default."""

MOST_GRADIENTS = 256
"""Examples whose gradients are taken, one by one."""


@dataclass(frozen=True, eq=False)
class Pruned:
    """A smaller network. keep: axis -> kept units of the original. cost: in the budget's unit."""

    network: Network
    couplings: Couplings
    keep: Mapping[str, Tensor]
    cost: float

    @property
    def module(self) -> nn.Module:
        return self.network.module

    def save(self, folder: str | Path) -> None:
        """safetensors and a JSON of kept units; `lighten.load(factory, folder)` reads them."""
        saved.save(self.network, Path(folder), self.couplings, self.keep)

    def _repr_html_(self) -> str:
        from lighten.report import notebook

        return notebook.of_rows(*self._rows())

    def __rich__(self) -> Any:
        from lighten.report.terminal import Records

        return Records.of(*self._rows())

    def _rows(self) -> tuple[str, list[dict[str, Any]]]:
        """A title, and the units of each axis that are left."""
        rows = [
            {"axis": axis.name, "kept": len(self.keep.get(axis.name, range(axis.width))),
             "of": axis.width}
            for axis in self.couplings.axes
        ]  # fmt: skip
        return f"Pruned to {self.network.parameters:,} parameters", rows


def prune_network(
    network: Network,
    data: Tensor | None,
    *,
    budget: str,
    criterion: str = GROUP_OBS,
    per_axis: bool = False,
    steps: int = 1,
    multiple: int = 1,
    compensate: bool = True,
    batch_norms: bool = True,
) -> Pruned:
    """Remove channels until the budget ("0.5 macs", "2M params") is met.

    data: inputs (count, ...) to calibrate on; not needed for a criterion that looks at weights
    alone, without compensation. criterion: "group_obs", or a name of `lighten list criteria`, whose
    scores are summed over each unit. per_axis: the same share of every axis. steps: scores are
    taken again that many times on the way. compensate: readers are solved again by least squares.
    batch_norms: their statistics are taken again where that helps on a part of the data that is
    held out for it; what was decided is in the result's notes. Raises UserError.
    """
    limit = Budget.parse(budget)
    if limit.unit not in ("macs", "params"):
        raise WrongUse(
            f"prune takes a budget of MACs or parameters, not of {limit.unit}",
            'write "0.5 macs"; `lighten compress` exports and meets bytes and milliseconds',
        )
    if steps < 1 or multiple < 1:
        raise WrongUse(f"steps={steps}, multiple={multiple}", "both are at least 1")
    check_criterion(criterion)
    if data is None and (compensate or criterion == GROUP_OBS):
        raise WrongUse(
            f"{'compensation' if compensate else criterion} needs data", "pass data=..., or"
            " criterion='l2' and compensate=False"
        )  # fmt: skip
    couplings = couple(network)
    sizes = network_cost.sizes(network)
    norms = Norms(network)
    whole = float(sizes["macs" if limit.unit == "macs" else "parameters"])
    room, small = limit.amount(whole), network
    ranking: dict[str, Curve] = {}
    kept: dict[str, Tensor] = {}
    for step in range(steps):
        here = whole * (room / whole) ** ((step + 1) / steps) if room < whole else room
        current = couple(small) if step else couplings
        with stage(f"rank channels {step + 1}/{steps}" if steps > 1 else "rank channels"):
            ranking = rank(small, current, data, criterion)
        try:
            found = _narrowed(small, current, ranking, limit, here, multiple, per_axis)
        except ImpossibleBudget as error:
            raise ImpossibleBudget(
                f"budget in {limit.unit}: {error.message}", error.hint
            ) from error
        kept = _composed(kept, found.keep)
        small = found.network
        if compensate and data is not None and kept:
            with stage("compensate", len(network.layers), "weights") as tick:
                small = make_up(network, small, couplings, kept, data, tick=tick)
        if batch_norms and data is not None and kept:
            with stage("batch norms"):
                norms = better_norms(network, small, data)
            small = norms.network
    if norms.said:
        note(norms.said)
        small = replace(small, notes=(*small.notes, norms.said))
    return Pruned(small, couplings, kept, found.cost)


def check_criterion(criterion: str) -> None:
    """Raise UnknownName for what is neither group OBS nor in the registry."""
    if criterion == GROUP_OBS or criterion in criteria:
        return
    names = [GROUP_OBS, *sorted(criteria)]
    near = difflib.get_close_matches(criterion, names, 3)
    guess = f"did you mean {' or '.join(f'`{n}`' for n in near)}? " if near else ""
    raise UnknownName(f"unknown criterion `{criterion}`", f"{guess}known: {', '.join(names)}")


def rank(
    network: Network, couplings: Couplings, data: Tensor | None, criterion: str
) -> dict[str, Curve]:
    """Axis -> the order in which its units would go, and what is lost on the way."""
    if criterion == GROUP_OBS and data is not None:
        return curves(network, couplings, data)
    plain = scales(network)
    try:
        scores = all_scores(network, couplings.free, criterion, plain)
    except WrongUse:  # it looks at more than weights
        if data is None:
            raise
        seen = with_gradients(hessians(network, data), gradients(network, data[:MOST_GRADIENTS]))
        scores = all_scores(network, couplings.free, criterion, scales(network, seen))
    return {name: _curve(score) for name, score in scores.items()}


def _curve(score: Tensor) -> Curve:
    """Units by score, what is lost being the share of the axis's scores that is gone."""
    order = score.argsort(stable=True)
    total = score.sum().clamp(min=1e-30)
    gone = (score[order] / total).cumsum(0)
    error = torch.cat([gone.flip(0), torch.zeros(1, dtype=gone.dtype)])
    error[0] = torch.inf
    return Curve(order, error)


def _narrowed(
    network: Network, couplings: Couplings, ranking: Mapping[str, Curve], limit: Budget,
    room: float, multiple: int, per_axis: bool,
) -> Narrowed:  # fmt: skip
    axes: list[Axis] = free(couplings.axes, ranking)
    spent = network_cost.counted(network, axes, limit.unit)
    way: Callable[..., dict[str, int]] = uniform if per_axis else spend
    choose = partial(way, axes, ranking, spent.terms, fixed=spent.fixed, multiple=multiple)
    return narrow(network, couplings, ranking, spent, room, lambda cost: choose(limit=cost))


def _composed(first: Mapping[str, Tensor], then: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kept units of the original, when units of what was left are kept."""
    found = dict(first)
    for name, units in then.items():
        found[name] = first[name][units] if name in first else units
    return found
