"""What every axis of a network loses at every width, in nats of KL divergence.

The order in which units go, and how the error grows between widths, is exact for the layers that
read the axis (lighten.removal). What that error costs at the network's output is measured at a few
widths, with those layers compensated; between these widths the logarithm of nats per error is
interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lighten.coupling.axes import Couplings
from lighten.moments import ROWS, hessians
from lighten.network import LINEAR, Network
from lighten.patches import Window
from lighten.removal import Reading, compensated, removal
from lighten.stepwise import Steps, Values, divergence, steps_of
from lighten.types import Axis, Stats
from lighten.widths import Curve

SHARES = (0.0, 0.25, 0.5, 0.75)
"""Widths that are measured, as shares of an axis: of 0, one unit stays."""

_FLOOR = 1e-8
_LOOKS = 256  # times that the order of removal is looked at again, on a wide axis


@torch.no_grad()
def curves(
    network: Network,
    couplings: Couplings,
    data: Tensor,
    *,
    measured: int = 256,
    shares: tuple[float, ...] = SHARES,
    rows: int = ROWS,
    batch: int = 64,
    seed: int = 0,
    tick: Callable[[int], None] | None = None,
) -> dict[str, Curve]:
    """Free axis -> Curve: the order of removal, and mean KL divergence in nats by units kept.

    data: (count, ...) inputs, for the Hessians; of these `measured` for the divergence. The error
    with no unit left is infinite. Where no layer that reads an axis can be compensated (it is read
    by a grouped or transposed convolution, or a recurrent layer), units go by the size of their
    weights, and their readers' columns are only zeroed. tick: called once an axis.
    """
    axes = couplings.free
    names = {m.parameter for a in axes for m in a.members if m.role == "reads"}
    found = hessians(network, data[: 2 * measured], names=names, rows=rows, batch=batch, seed=seed)
    state = network.module.state_dict()
    steps, batches = steps_of(network, data[:measured], batch)
    plans = [_plan(axis, state, found, steps) for axis in axes]
    at: dict[fx.Node, list[_Plan]] = {}
    for plan in plans:
        if plan.start is not None:
            at.setdefault(plan.start, []).append(plan)
    values: Values = {}
    points: dict[str, dict[int, float]] = {}
    truth = steps.whole(batches)
    for node in steps.nodes:
        for plan in at.get(node, ()):
            points[plan.axis.name] = _measure(steps, plan, values, truth, shares)
            if tick:
                tick(1)
        values[node] = (
            list(batches) if node.op == "placeholder" else steps.compute(node, values, len(batches))
        )
        steps.forget(node, values)
    return {
        plan.axis.name: Curve(
            plan.order, _between(plan.error, points[plan.axis.name], plan.axis.width)
        )
        for plan in plans
        if plan.axis.name in points
    }


@dataclass(frozen=True, eq=False)
class _Plan:
    """How an axis is narrowed. error: by units kept, of its readers, None where they have none."""

    axis: Axis
    order: Tensor
    error: Tensor | None
    readings: Mapping[str, tuple[Reading, Tensor]]  # parameter -> (reading, mean of inputs)
    zeroed: Mapping[str, tuple[Tensor, int, Tensor]]  # parameter -> (value, dim, index)
    nodes: Mapping[str, list[fx.Node]]
    start: fx.Node | None


def _plan(
    axis: Axis, state: Mapping[str, Tensor], found: Mapping[str, Stats], steps: Steps
) -> _Plan:
    readings: dict[str, tuple[Reading, Tensor]] = {}
    zeroed: dict[str, tuple[Tensor, int, Tensor]] = {}
    for member in axis.members:
        if member.role != "reads":
            continue
        weight, stats = state[member.parameter], found.get(member.parameter)
        fits = stats is not None and stats.hessian.ndim == 2 and member.dim == 1
        if not fits or stats is None or stats.mean is None or member.parameter in readings:
            zeroed[member.parameter] = (weight, member.dim, member.index)
            readings.pop(member.parameter, None)
            continue
        kernel = weight[0, 0].numel()
        columns = member.index.to(weight.device).unsqueeze(2) * kernel
        columns = (columns + torch.arange(kernel, device=weight.device)).flatten(1)
        covariance = stats.hessian - torch.outer(stats.mean, stats.mean)
        reading = Reading(weight.flatten(1).float(), covariance, columns)
        readings[member.parameter] = (reading, stats.mean)
    if readings:
        looks = max(1, axis.width // _LOOKS)
        order, error = removal([r for r, _ in readings.values()], at_once=looks)
    else:
        order, error = _by_size(axis, state), None
    parameters = {*readings, *zeroed}
    nodes: dict[str, list[fx.Node]] = {}
    for node in steps.nodes:
        if node.op == "get_attr" and str(node.target) in parameters:
            nodes.setdefault(str(node.target), []).extend(node.users)
    users = [n for group in nodes.values() for n in group]
    start = min(users, key=steps.order.__getitem__) if users else None
    return _Plan(axis, order, error, readings, zeroed, nodes, start)


def _by_size(axis: Axis, state: Mapping[str, Tensor]) -> Tensor:
    """Units, those with the smallest product of written and read weights first."""
    score = torch.zeros(axis.width, dtype=torch.float64)
    for member in axis.members:
        if member.role == "carries":
            continue
        slices = state[member.parameter].double().movedim(member.dim, 0).flatten(1)
        size = slices.square().sum(1)[member.index.to(slices.device)].sum(1).cpu()
        score += size.clamp(min=1e-30).log()
    return score.argsort(stable=True)


def _measure(
    steps: Steps, plan: _Plan, values: Values, truth: list[Tensor], shares: tuple[float, ...]
) -> dict[int, float]:
    """Units kept -> nats, at a few widths."""
    width, found = plan.axis.width, {}
    for kept in sorted({max(1, round(share * width)) for share in shares} - {width}):
        changed, added = _narrowed(plan, kept)
        if plan.start is None:
            continue
        out = steps.rest(plan.start, values, len(truth), changed, added)
        total = sum(len(t) for t in truth)
        nats = sum(
            float(divergence(t, o)) * len(t) for t, o in zip(truth, out, strict=True)
        )  # fmt: skip
        found[kept] = nats / total
    return found


def _narrowed(plan: _Plan, kept: int) -> tuple[dict[str, Tensor], dict[fx.Node, Tensor]]:
    """Parameters with all but `kept` units removed, and what their nodes' outputs gain."""
    changed: dict[str, Tensor] = {}
    added: dict[fx.Node, Tensor] = {}
    gone = plan.order[: plan.axis.width - kept]
    for name, (reading, mean) in plan.readings.items():
        stays = torch.ones(reading.weight.shape[1], dtype=torch.bool, device=mean.device)
        stays[reading.columns[gone.to(mean.device)].flatten()] = False
        weight = compensated(reading.weight, reading.covariance, stays.nonzero().flatten())
        for node in plan.nodes.get(name, ()):
            window = Window.of(node)
            shift = (reading.weight - weight) @ mean
            if window is not None and node.target not in LINEAR:
                shift = shift.view(-1, *[1] * len(window.kernel))
            added[node] = shift
            shape = node.args[1].meta["val"].shape  # type: ignore[union-attr]
            changed[name] = weight.view(shape)
    for name, (value, dim, index) in plan.zeroed.items():
        cut = changed.get(name, value).clone()
        cut.index_fill_(dim, index[gone].flatten().to(cut.device), 0)
        changed[name] = cut
    return changed, added


def _between(error: Tensor | None, points: Mapping[int, float], widest: int) -> Tensor:
    """(width + 1,) nats by units kept; error None: the logarithm of nats itself is interpolated."""
    known = sorted(points)
    found = torch.zeros(widest + 1, dtype=torch.float64)
    found[0] = math.inf

    def base(kept: int) -> float:
        return max(float(error[kept]), 1e-12) if error is not None else 1.0

    ratios = {kept: math.log(max(points[kept], _FLOOR) / base(kept)) for kept in known}
    for kept in range(1, widest):
        below = max((k for k in known if k <= kept), default=known[0])
        above = min((k for k in known if k >= kept), default=known[-1])
        part = 0.0 if above == below else (kept - below) / (above - below)
        found[kept] = base(kept) * math.exp((1 - part) * ratios[below] + part * ratios[above])
    return found
