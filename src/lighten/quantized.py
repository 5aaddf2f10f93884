"""A quantized network as a value: what the exporters write and the simulation computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lighten.network import Network
from lighten.types import Compressed


@dataclass(frozen=True)
class Edge:
    """A quantizer of one tensor: real = scale * (q - zero), one scale for the whole tensor.

    q lies in [0, 2^bits - 1], or where signed in [-2^(bits-1), 2^(bits-1) - 1].

    >>> Edge(0.5, 128).low, Edge(0.5, 128).high
    (-64.0, 63.5)
    """

    scale: float
    zero: int
    bits: int = 8
    signed: bool = False

    @property
    def first(self) -> int:
        """The least code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def last(self) -> int:
        """The greatest code."""
        return self.first + (1 << self.bits) - 1

    @property
    def low(self) -> float:
        """The least real number that the edge can carry."""
        return self.scale * (self.first - self.zero)

    @property
    def high(self) -> float:
        """The greatest real number that the edge can carry."""
        return self.scale * (self.last - self.zero)


@dataclass(frozen=True)
class Quantized:
    """A network with static quantization.

    network: the float network after function-preserving transforms; names below are those of its
    graph and its state dict. weights: parameter's name -> its codes, convolutions as
    (out, in * kh * kw); parameters that are not in it stay float. edges: name of a graph node
    (operator or placeholder) -> the quantizer of that node's output; other tensors stay float.
    Biases of nodes whose input edge and weight are quantized are int32 with the scale
    input scale * weight scale, per channel.
    """

    network: Network
    weights: Mapping[str, Compressed]
    edges: Mapping[str, Edge]
