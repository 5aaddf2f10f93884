"""From scores of weights to units of axes, and from those to what stays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from lighten.checked import Criterion
from lighten.errors import BadInput, WrongUse
from lighten.network import Network, aten, weighted
from lighten.registry import criteria
from lighten.types import Axis, Stats

Scores = Mapping[str, Tensor]
"""Axis -> (width,), the higher the more its unit is worth."""


def axis_scores(
    network: Network,
    axis: Axis,
    criterion: str | Criterion,
    stats: Mapping[str, Stats] | None = None,
) -> Tensor:
    """(width,) float64: the sum of the criterion's scores over each unit's slices.

    Those are rows of the weights that write the axis and columns of those that read it; a criterion
    that judges whole outputs sees only rows. stats: by parameter. Raises WrongUse where the
    criterion needs statistics that are not there, BadInput for NaN.
    """
    return all_scores(network, [axis], criterion, stats)[axis.name]


def all_scores(
    network: Network,
    axes: Iterable[Axis],
    criterion: str | Criterion,
    stats: Mapping[str, Stats] | None = None,
) -> dict[str, Tensor]:
    """axis_scores of several axes, each weight judged once."""
    judge: Criterion = criteria[criterion] if isinstance(criterion, str) else criterion
    roles = ("writes",) if getattr(judge, "outputs", False) else ("writes", "reads")
    tensors = network.module.state_dict()
    known: dict[str, Tensor] = {}
    found = {}
    for axis in axes:
        total = torch.zeros(axis.width, dtype=torch.float64)
        for member in axis.members:
            weight = tensors[member.parameter]
            if member.role not in roles or weight.dim() < 2:
                continue
            if member.parameter not in known:
                matrix = weight.flatten(1).float()
                seen = (stats or {}).get(member.parameter)
                known[member.parameter] = judge(matrix, seen).reshape(weight.shape)
            score = known[member.parameter].double()
            others = [d for d in range(score.dim()) if d != member.dim]
            per_channel = score.sum(others) if others else score
            total += per_channel[member.index.to(score.device)].sum(1).cpu()
        found[axis.name] = total
    return found


def choose(
    scores: Scores,
    share: float,
    per_axis: bool = False,
    multiple: int = 1,
    relative: bool = True,
) -> dict[str, Tensor]:
    """Axis -> sorted units that stay (int64) when `share` of all units goes, the lowest first.

    per_axis: `share` of each axis. Else units of all axes compete: relative to the mean of their
    axis, or as they are where scores mean the same everywhere (nats, as taylor2 gives).
    multiple: widths that stay are multiples of it, as near to the share as that allows (globally:
    never more is removed than asked). At least `multiple` units of an axis stay. Raises WrongUse
    for a share that is not in [0, 1), BadInput for NaN.
    """
    if not 0 <= share < 1 or multiple < 1:
        raise WrongUse(
            f"a share of {share:g} with widths in multiples of {multiple} cannot be removed",
            "the share is in [0, 1), the multiple at least 1",
        )
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise BadInput(f"scores of axis `{name}` are NaN or infinite", "score it again")
    if per_axis:
        widths = {
            name: min(len(s), max(multiple, round(len(s) * (1 - share) / multiple) * multiple))
            for name, s in scores.items()
        }
    else:
        widths = _compete(scores, share, multiple, relative)
    return {name: highest(score, widths[name]) for name, score in scores.items()}


def highest(score: Tensor, count: int) -> Tensor:
    """The sorted positions of the `count` highest; of equal ones the first."""
    order = score.argsort(descending=True, stable=True)
    return order[:count].sort().values


@dataclass(frozen=True)
class _Step:
    """Units of an axis that go together, after those of the steps before."""

    score: float
    size: int
    axis: str


def _compete(scores: Scores, share: float, multiple: int, relative: bool) -> dict[str, int]:
    """Widths that stay, the lowest units of all axes gone."""
    widths = {name: len(score) for name, score in scores.items()}
    room = round(share * sum(widths.values()))
    steps: list[_Step] = []
    for name, score in scores.items():
        values = score.double().sort().values
        if relative:
            mean = values.mean()
            values = values / mean if mean > 0 else values
        start, width = 0, len(values)
        while width - start > multiple:
            size = (width - start) % multiple or multiple
            steps.append(_Step(float(values[start : start + size].mean()), size, name))
            start += size
    full: set[str] = set()
    for step in sorted(steps, key=lambda s: s.score):
        if step.axis in full:
            continue
        if step.size > room:  # what comes after it in its axis is worth more: not before it
            full.add(step.axis)
            continue
        widths[step.axis] -= step.size
        room -= step.size
    return widths


def shares(share: float, steps: int) -> Sequence[float]:
    """What to remove of what is left, `steps` times, to remove `share` in all.

    Scores change when units go, so several small steps with new scores beat one.
    """
    if steps < 1:
        raise WrongUse(f"{steps} steps cannot be made", "at least 1")
    return [1 - (1 - share) ** (1 / steps)] * steps


def scales(network: Network, stats: Mapping[str, Stats] | None = None) -> dict[str, Stats]:
    """Stats with the scale of the batch norm that follows each weight at once, where one does."""
    found = dict(stats or {})
    tensors = network.module.state_dict()
    for node, name in weighted(network.graph):
        norm = next(iter(node.users), None)
        if len(node.users) != 1 or norm is None or norm.target is not aten.batch_norm.default:
            continue
        scale = norm.args[1]
        if isinstance(scale, fx.Node) and scale.op == "get_attr":
            empty = torch.empty(0, device=network.device)
            found[name] = replace(
                found.get(name, Stats(0, empty)), scale=tensors[str(scale.target)].detach()
            )
    return found
