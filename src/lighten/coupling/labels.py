"""Labels of channels, and which of them are the same channel.

A label is a positive integer: one position along one dimension of one tensor. 0 is no channel: a
position that nothing can remove. `Labels` says, for the elements of a tensor, which channel each
belongs to; it is stored with size 1 along all dimensions on which that does not depend, so a label
tensor of a large activation has as many elements as there are channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Labels:
    """Which channel each element of a tensor belongs to.

    ids: int64, as many dimensions as the tensor, size 1 where it does not vary. zero: once a
    channel's weights are zeroed, the elements that belong to it are zero.
    """

    ids: Tensor
    zero: bool = False

    @classmethod
    def compact(cls, full: Tensor, zero: bool = False) -> Labels:
        """From ids of the tensor's own shape."""
        for dim, size in enumerate(full.shape):
            first = full.narrow(dim, 0, 1) if size else full
            if size > 1 and (full.stride(dim) == 0 or bool((full == first).all())):
                full = first
        return cls(full, zero)

    @cached_property
    def varies(self) -> frozenset[int]:
        """Dimensions along which the channel changes."""
        return frozenset(d for d, size in enumerate(self.ids.shape) if size > 1)

    def first(self, dims: Iterable[int]) -> Labels:
        """As it is at the first position along dims."""
        ids = self.ids
        for dim in dims:
            ids = ids.narrow(dim, 0, 1)
        return Labels(ids, self.zero)

    def leading(self, rank: int) -> Labels:
        """Of the tensor with dimensions of size 1 in front, `rank` in all."""
        return Labels(self.ids[(None,) * (rank - self.ids.dim())], self.zero)


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the graph: its shape and the labels of its channels, one for each origin.

    stored: made of parameters and constants only.
    """

    shape: tuple[int, ...]
    labels: tuple[Labels, ...] = ()
    stored: bool = False

    def along(self, dim: int) -> list[Labels]:
        """Labels that vary along a dimension."""
        return [x for x in self.labels if dim in x.varies]


@dataclass
class Classes:
    """A union-find over labels, solved at once for all edges collected so far."""

    count: int = 1
    edges: list[tuple[Ints, Ints]] = field(default_factory=list)
    locks: list[tuple[Ints, str]] = field(default_factory=list)

    def fresh(self, n: int) -> Tensor:
        """n new labels."""
        self.count += n
        return torch.arange(self.count - n, self.count)

    def unite(self, a: Tensor, b: Tensor, why: str) -> None:
        """Elementwise the same channel, after broadcasting; what meets a 0 is locked: `why`."""
        shape = np.broadcast_shapes(tuple(a.shape), tuple(b.shape))
        a, b = a.expand(shape), b.expand(shape)
        x, y = a.reshape(-1).numpy(), b.reshape(-1).numpy()
        both = (x > 0) & (y > 0)
        if both.any():
            self.edges.append((x[both], y[both]))
        if not both.all():
            self.lock(torch.from_numpy(np.maximum(x, y)[~both]), why)

    def lock(self, ids: Tensor, why: str) -> None:
        """None of these can be removed."""
        x = ids.reshape(-1).numpy()
        x = x[x > 0]
        if len(x):
            self.locks.append((np.unique(x), why))

    def roots(self) -> Ints:
        """Label -> number of its class; 0 for 0."""
        self._merge()
        if not self.edges:
            return np.arange(self.count)
        a, b = self.edges[0]
        links = coo_matrix((np.ones(len(a), np.int8), (a, b)), (self.count, self.count))
        _, roots = connected_components(links, directed=False)
        # classes numbered by their first label: label 0 stays alone in class 0
        return np.asarray(roots, np.int64)

    def _merge(self) -> None:
        """All edges in one pair of arrays, each once."""
        if len(self.edges) > 1:
            a = np.concatenate([e[0] for e in self.edges])
            b = np.concatenate([e[1] for e in self.edges])
            low, high = np.minimum(a, b), np.maximum(a, b)
            pairs = np.unique(low * self.count + high)
            self.edges = [(pairs // self.count, pairs % self.count)]
