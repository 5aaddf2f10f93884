"""What a network costs at given widths: multiply-adds, parameters, bytes, as terms of decisions.

Every weight is a box; along each dimension it keeps some channels of some axes and all that belongs
to none. Its parameters are the product of what it keeps, its multiply-adds that times how often
each number is used, its bytes that times the bits of its format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lighten.decide import Term, Values
from lighten.network import Network
from lighten.types import Axis


@dataclass(frozen=True)
class Extent:
    """One dimension of a parameter: `still` channels that no axis owns, and `per` unit of each."""

    still: int
    per: tuple[tuple[str, int], ...]

    def at(self, widths: Values) -> int:
        return self.still + sum(k * int(widths[axis]) for axis, k in self.per)


def extents(network: Network, axes: Iterable[Axis]) -> dict[str, tuple[Extent, ...]]:
    """Parameter or buffer -> its dimensions, for those that some axis lies in."""
    owned: dict[str, dict[int, list[tuple[str, int]]]] = {}
    for axis in axes:
        for member in axis.members:
            dims = owned.setdefault(member.parameter, {})
            dims.setdefault(member.dim, []).append((axis.name, member.index.shape[1]))
    widths = {axis.name: axis.width for axis in axes}
    state = network.module.state_dict()
    found = {}
    for name, dims in owned.items():
        shape = state[name].shape
        found[name] = tuple(
            Extent(
                size - sum(widths[axis] * k for axis, k in dims.get(d, [])),
                tuple(dims.get(d, [])),
            )
            for d, size in enumerate(shape)
        )
    return found


def size_terms(
    network: Network, axes: Iterable[Axis], per_number: Mapping[str, float]
) -> tuple[list[Term], float]:
    """(terms, fixed cost). per_number: what one stored number of each parameter costs: 1 for
    parameters, uses per example for multiply-adds, bytes for bytes; others cost nothing."""
    found = extents(network, axes)
    sizes = {name: t.numel() for name, t in network.module.state_dict().items()}
    fixed = sum(each * sizes[name] for name, each in per_number.items() if name not in found)
    terms = []
    for name, each in per_number.items():
        if name in found:
            names = {axis for extent in found[name] for axis, _ in extent.per}
            terms.append(Term(tuple(sorted(names)), _product(found[name], each)))
    return terms, float(fixed)


def _product(dims: tuple[Extent, ...], each: float) -> Callable[[Values], float]:
    def cost(widths: Values) -> float:
        total = each
        for extent in dims:
            total *= extent.at(widths)
        return total

    return cost


def parameter_counts(network: Network) -> dict[str, float]:
    """1 for every parameter, tied ones once."""
    return {name: 1.0 for name, _ in network.module.named_parameters()}
