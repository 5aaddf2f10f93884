"""Axes: the classes of labels that have the same places in the same tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from lighten.coupling.labels import Ints, Value
from lighten.coupling.trace import Origin, Trace
from lighten.errors import WrongUse
from lighten.network import Network
from lighten.types import Axis, Member

Keep = Mapping[str, Tensor]
"""Axis name -> units kept, sorted int64; axes that are not named are kept whole."""


@dataclass(frozen=True, eq=False)
class Couplings:
    """Which channels of a network live and die together.

    axes: locked ones too, with the reason. unknown: operator without a rule -> names of its nodes
    in `Network.graph`; what they touch is locked.
    """

    axes: tuple[Axis, ...]
    unknown: Mapping[str, list[str]]
    trace: Trace = field(repr=False)
    roots: Ints = field(repr=False)
    units: tuple[Ints, ...] = field(repr=False)  # of each axis: the classes of its units

    @cached_property
    def named(self) -> dict[str, Axis]:
        return {a.name: a for a in self.axes}

    @cached_property
    def free(self) -> tuple[Axis, ...]:
        """Axes that are not locked."""
        return tuple(a for a in self.axes if a.locked is None)

    def __getitem__(self, name: str) -> Axis:
        if name not in self.named:
            raise WrongUse(f"no axis is called `{name}`", f"axes: {', '.join(self.named)}")
        return self.named[name]

    def members(self, axis: str, role: str) -> tuple[Member, ...]:
        return tuple(m for m in self[axis].members if m.role == role)

    def writers(self, axis: str) -> tuple[Member, ...]:
        """Weights whose outputs are the axis."""
        return self.members(axis, "writes")

    def readers(self, axis: str) -> tuple[Member, ...]:
        """Weights whose inputs are the axis."""
        return self.members(axis, "reads")

    def check(self, keep: Keep) -> None:
        """Raises WrongUse for an axis that is unknown or locked, or units that are not there."""
        for name, kept in keep.items():
            axis = self[name]
            if kept.dtype != torch.int64 or kept.dim() != 1:
                raise WrongUse(f"kept units of `{name}` are {kept.dtype} {tuple(kept.shape)}",
                               "give a vector of int64")  # fmt: skip
            if len(kept) == axis.width:
                if not torch.equal(kept.cpu(), torch.arange(axis.width)):
                    raise WrongUse(f"kept units of `{name}` are not sorted or not its own")
                continue
            if axis.locked is not None:
                raise WrongUse(f"axis `{name}` cannot shrink: {axis.locked}")
            if len(kept) == 0:
                raise WrongUse(f"axis `{name}` would have no unit left", "keep at least one")
            inside = bool((kept >= 0).all()) and bool((kept < axis.width).all())
            if not inside or not bool((kept[1:] > kept[:-1]).all()):
                raise WrongUse(f"kept units of `{name}` are not sorted, or outside 0..{axis.width}")

    def removed(self, keep: Keep) -> Any:
        """(classes,) bool: which classes of labels go."""
        self.check(keep)
        gone = np.zeros(int(self.roots.max()) + 1, dtype=bool)
        for axis, classes in zip(self.axes, self.units, strict=True):
            if axis.name in keep:
                mask = np.ones(axis.width, dtype=bool)
                mask[keep[axis.name].cpu().numpy()] = False
                gone[classes[mask]] = True
        return gone

    def positions(self, keep: Keep) -> dict[str, dict[int, Tensor]]:
        """Parameter -> dimension -> kept positions, of all that shrink."""
        gone = self.removed(keep)
        found: dict[str, dict[int, Tensor]] = {}
        for o in self.trace.origins:
            here = ~gone[self.roots[o.start : o.start + o.size]]
            if not here.all():
                found.setdefault(o.parameter, {})[o.dim] = torch.from_numpy(np.flatnonzero(here))
        return found

    def kept(self, parameter: str, keep: Keep) -> tuple[Tensor, ...]:
        """Kept positions along every dimension of a stored tensor that has labels."""
        gone = self.removed(keep)
        own = [o for o in self.trace.origins if o.parameter == parameter]
        if parameter not in self.ranks:
            raise WrongUse(f"`{parameter}` is no tensor of the network's graph")
        shape = [1] * self.ranks[parameter]
        for o in own:
            shape[o.dim] = o.size
        dims = [torch.arange(n) for n in shape]
        for o in own:
            dims[o.dim] = torch.from_numpy(
                np.flatnonzero(~gone[self.roots[o.start : o.start + o.size]])
            )
        return tuple(dims)

    def retrace(self, graph: fx.GraphModule, stored: Mapping[str, str], keep: Keep) -> Left:
        """What stays in another graph of the same network."""
        trace = Trace()
        trace.run(graph, stored)
        roots = trace.classes.roots()
        gone = np.zeros(int(roots.max()) + 1, dtype=bool)
        positions = self.positions(keep)
        for o in trace.origins:
            kept = positions.get(o.parameter, {}).get(o.dim)
            if kept is not None:
                mask = np.ones(o.size, dtype=bool)
                mask[kept.numpy()] = False
                gone[roots[o.start : o.start + o.size][mask]] = True
        return Left(trace, roots, gone)

    def stay(self, keep: Keep) -> Left:
        """What stays in the network's own graph."""
        return Left(self.trace, self.roots, self.removed(keep))

    @cached_property
    def ranks(self) -> dict[str, int]:
        return {v.name: v.rank for v in self.trace.tensors}


@dataclass(frozen=True, eq=False)
class Left:
    """What is left of every value of a graph. gone: (classes,) bool."""

    trace: Trace
    roots: Ints
    gone: Any

    def mask(self, value: Value, dim: int) -> Tensor:
        """Which positions along a dimension stay."""
        dim %= len(value.shape)
        stay = torch.ones(value.shape[dim], dtype=torch.bool)
        for x in value.along(dim):
            left = torch.from_numpy(~self.gone[self.roots[x.ids.numpy()]])
            stay &= left.movedim(dim, 0).reshape(left.shape[dim], -1).any(1)
        return stay

    def size(self, value: Value, dim: int) -> int:
        return int(self.mask(value, dim).sum())

    def shape(self, value: Value) -> list[int]:
        return [self.size(value, d) for d in range(len(value.shape))]

    def value(self, node: Any) -> Any:
        return self.trace.values[node.name]


def stored_names(module: nn.Module) -> dict[str, str]:
    """Name of every floating tensor of a module -> its first name (tied tensors have several)."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    both = (*module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False))  # fmt: skip
    for name, tensor in both:
        if tensor.is_floating_point() or tensor.is_complex():
            names[name] = first.setdefault(id(tensor), name)
    return names


def analyse(network: Network) -> Couplings:
    """Find which channels live and die together, from the network's graph alone."""
    trace = Trace()
    trace.run(network.graph, stored_names(network.module))
    roots = trace.classes.roots()
    axes, units = _axes(trace, roots)
    return Couplings(axes, dict(trace.unknown), trace, roots, units)


def _axes(trace: Trace, roots: Ints) -> tuple[tuple[Axis, ...], tuple[Ints, ...]]:
    classes = int(roots.max()) + 1
    reason, locked = _locks(trace, roots, classes)
    sizes = np.array([o.size for o in trace.origins], np.int64)
    if not len(sizes):
        return (), ()
    home = np.repeat(np.arange(len(sizes)), sizes)
    starts = np.array([o.start for o in trace.origins])
    place = np.arange(len(home)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    root = roots[np.repeat(starts, sizes) + place]
    order = np.lexsort((place, home, root))
    root, home, place = root[order], home[order], place[order]
    # runs of one class in one dimension of one tensor
    edge = np.flatnonzero(np.diff(root, prepend=-1) | np.diff(home, prepend=-1))
    run_root, run_home = root[edge], home[edge]
    count = np.diff(np.append(edge, len(root)))
    signature = _signatures(run_root, run_home, count, locked, classes)
    present, first_run = np.unique(run_root, return_index=True)
    groups: dict[tuple[int, int], list[int]] = {}
    for c in present.tolist():
        groups.setdefault((int(signature[0][c]), int(signature[1][c])), []).append(c)
    bounds = dict(zip(present.tolist(), first_run.tolist(), strict=True))
    last = dict(
        zip(present.tolist(), np.append(first_run[1:], len(run_root)).tolist(), strict=True)
    )
    found = []
    for members in groups.values():
        lead = members[0]
        runs = range(bounds[lead], last[lead])
        if all(_hidden(trace.origins[run_home[r]], reason.get(lead)) for r in runs):
            continue
        built = []
        for offset, r in enumerate(runs):
            k = int(count[r])
            rows = edge[[bounds[c] + offset for c in members]]
            index = place[rows[:, None] + np.arange(k)]
            built.append((trace.origins[run_home[r]], index))
        found.append((members, built, reason.get(lead)))
    return _named(trace, roots, found)


def _signatures(root: Ints, home: Ints, count: Ints, locked: Any, classes: int) -> tuple[Any, Any]:
    """Two 64-bit sums that are equal for classes with the same places in the same tensors."""
    found = []
    for salt in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F):
        with np.errstate(over="ignore"):
            x = (home.astype(np.uint64) << np.uint64(32)) ^ count.astype(np.uint64)
            x = (x + np.uint64(1)) * np.uint64(salt)
            x ^= x >> np.uint64(31)
            x *= np.uint64(0xBF58476D1CE4E5B9)
            x ^= x >> np.uint64(29)
            total = np.zeros(classes, np.uint64)
            np.add.at(total, root, x)
            total += locked.astype(np.uint64) * np.uint64(salt)
        found.append(total)
    return found[0], found[1]


def _locks(trace: Trace, roots: Ints, classes: int) -> tuple[dict[int, str], Any]:
    """The first reason of every locked class, and a number for each reason (0: not locked)."""
    number = np.zeros(classes, np.int64)
    number[roots[0]] = 1
    whys = ["a position that no weight writes"]
    for ids, why in trace.classes.locks:
        hit = np.unique(roots[ids])
        hit = hit[number[hit] == 0]
        if len(hit):
            whys.append(why)
            number[hit] = len(whys)
    reason = {int(c): whys[number[c] - 1] for c in np.flatnonzero(number)}
    return reason, number


def _hidden(origin: Origin, reason: str | None) -> bool:
    """Places of a kernel are no axes."""
    return reason is not None and reason.startswith("a place of")


def _named(
    trace: Trace, roots: Ints, found: list[tuple[list[int], list[tuple[Origin, Any]], str | None]]
) -> tuple[tuple[Axis, ...], tuple[Ints, ...]]:
    marks = {
        kind: np.unique(roots[torch.cat([x.reshape(-1) for x in ids]).numpy()])
        for kind, ids in trace.marks.items()
    }
    axes: list[Axis] = []
    units: list[Ints] = []
    ordered = []
    for classes, built, why in found:
        writers = [o for o, _ in built if o.role == "writes"]
        lead = min(writers or [o for o, _ in built], key=lambda o: (o.order, o.start))
        index = next(i for o, i in built if o is lead)
        order = np.argsort(index[:, 0], kind="stable")
        ordered.append((lead, int(index[order[0], 0]), np.array(classes)[order], built, order, why))
    ordered.sort(key=lambda item: (item[0].order, item[0].start, item[1]))
    names = _names([(lead, why) for lead, _, _, _, _, why in ordered])
    for name, (_, _, own, built, order, why) in zip(names, ordered, strict=True):
        kind = next((k for k in ("heads", "groups") if k in marks
                     and np.isin(own, marks[k]).any()), "channels")  # fmt: skip
        members = tuple(
            Member(o.parameter, o.dim, torch.from_numpy(np.ascontiguousarray(i[order])),
                   o.role or "carries")
            for o, i in sorted(built, key=lambda item: item[0].start)
        )  # fmt: skip
        if why is None and len(own) == 1:
            why = "it is one unit: nothing can be removed of it"
        axes.append(Axis(name, len(own), kind, members, why))
        units.append(own)
    return tuple(axes), tuple(units)


def _names(leads: list[tuple[Origin, str | None]]) -> list[str]:
    """Each after the tensor that writes it; where several are, those that can shrink come first."""
    names: dict[int, str] = {}
    used: set[str] = set()
    for i in sorted(range(len(leads)), key=lambda i: leads[i][1] is not None):
        lead = leads[i][0]
        base = lead.parameter if lead.role == "writes" else f"{lead.parameter}[{lead.dim}]"
        name, n = base, 2
        while name in used:
            name, n = f"{base}:{n}", n + 1
        used.add(name)
        names[i] = name
    return [names[i] for i in range(len(leads))]
