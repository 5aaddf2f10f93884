"""The nouns. Everything here is a value: made once, passed on, never changed.

A weight is always seen as a matrix (out, in), whatever shape its module stores it in.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lighten.errors import WrongUse

Grid = dict[str, Tensor]
"""What a format fits: tensors whose first two dimensions are (out, blocks)."""


@dataclass(frozen=True)
class Layer:
    """One weight of a network.

    name: the parameter's name in the state dict. shape: (out, in). kind: "linear", "embedding",
    "head" (tied: "embedding+head"), "conv". transposed: stored as (in, out), as GPT-2 does.
    shares: layers with an equal value here see the same input, hence have one Hessian.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    calls: int = 1
    transposed: bool = False
    block: int | None = None
    shares: str = ""

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Spec:
    """What is done to one weight. Reads and writes as text.

    sparsity: "0.5" (that share goes), "2:4" (2 of 4 in a row stay), "t0.01" (what is larger stays).

    >>> Spec.parse("int4_g128@gptq")
    Spec(format='int4_g128', sparsity=None, rank=None, activations=None, solver='gptq')
    >>> str(Spec.parse("int8+2:4"))
    'int8+2:4'
    """

    format: str | None = None
    sparsity: str | None = None
    rank: int | None = None
    activations: str | None = None
    solver: str | None = None

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Read `format+sparsity+r<rank>+a<activations>@solver`; every part may be missing."""
        body, _, solver = text.strip().partition("@")
        parts: dict[str, Any] = {"solver": solver or None}
        for part in body.split("+"):
            if part in ("", "keep"):
                continue
            if re.fullmatch(r"\d+:\d+|0?\.\d+|t\d*\.?\d+(e-?\d+)?", part):
                key, value = "sparsity", part
            elif re.fullmatch(r"r\d+", part):
                key, value = "rank", int(part[1:])  # type: ignore[assignment]
            elif re.fullmatch(r"a\d+", part):
                key, value = "activations", part[1:]
            else:
                key, value = "format", part
            if parts.get(key) is not None:
                raise WrongUse(f"spec `{text}` names its {key} twice", "one part of each kind")
            parts[key] = value
        return cls(**parts)

    def __str__(self) -> str:
        rank = None if self.rank is None else f"r{self.rank}"
        activations = None if self.activations is None else f"a{self.activations}"
        body = "+".join(p for p in (self.format, self.sparsity, rank, activations) if p) or "keep"
        return f"{body}@{self.solver}" if self.solver else body


@dataclass(frozen=True)
class Stats:
    """Sums over the n calibration positions that a layer saw.

    hessian: (in, in), X Xᵀ / n. low, high: range of the inputs. gradient: (out,), mean square of
    the loss gradient at each output, in nats² per unit² (the diagonal of the Fisher matrix).
    frequency: (out,), for embeddings: how often each row was looked up, as a share of n.
    peaks: block -> (in / block,), mean square of the largest magnitude in each block of inputs, for
    runtimes that round inputs to 8 bits block by block. mean: (in,) of the inputs. Of a grouped
    convolution of a network, hessian is (groups, in, in) and mean (groups, in). slope, curvature:
    (out, in), mean and mean square of each weight's gradient. scale: (out,), of the norm behind it.
    """

    n: int
    hessian: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    gradient: Tensor | None = None
    frequency: Tensor | None = None
    peaks: Mapping[int, Tensor] | None = None
    mean: Tensor | None = None
    slope: Tensor | None = None
    curvature: Tensor | None = None
    scale: Tensor | None = None


class Format(Protocol):
    """A set of numbers and its bytes. Weights w are (out, n) float32, n a multiple of `block`.

    block: columns that share one grid entry; 0: the whole row does. step: columns that must be
    encoded together (1 unless the codes of neighbours are tied). sub: columns whose share of the
    grid can be fitted again when the rest of the block stands (equal to `block` where there is no
    such part): then `refit` exists. Where the stored form is not one row per row of the weight,
    `take(parts, shape, index)` gives the parts of the rows `index`.
    """

    name: str
    block: int
    sub: int
    step: int

    def bits(self, columns: int) -> float:
        """Stored bits per weight in rows of `columns`, scales and padding counted."""

    def accepts(self, shape: tuple[int, int]) -> str | None:
        """None, or why a weight of this shape cannot be stored so."""

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Grid:
        """The grid that suits w best; squared errors weighted by importance (n,) or (out, n)."""

    def encode(self, w: Tensor, grid: Grid, start: int = 0) -> Tensor:
        """Nearest codes (out, k) for columns start..start+k of those that the grid covers."""

    def decode(self, codes: Tensor, grid: Grid, start: int = 0) -> Tensor:
        """The numbers (out, k), float32, that the runtime computes with."""

    def settle(self, part: str, value: Tensor) -> Tensor:
        """The nearest values that the grid's tensor `part` can store; decode is linear in each."""

    def refit(self, w: Tensor, grid: Grid, start: int, importance: Tensor | None = None) -> Grid:
        """The grid with the share of w (out, sub), its columns from `start` on, chosen again."""

    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        """The stored form, row by row: tensors whose first dimension is out."""

    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Grid]:
        """The inverse of pack."""


@dataclass(frozen=True)
class Compressed:
    """A compressed weight: a value, not a module. `parts` is the stored form (Format.pack)."""

    spec: Spec
    shape: tuple[int, int]
    format: Format
    parts: Mapping[str, Tensor]

    def dense(self) -> Tensor:
        """(out, in) float32: the numbers that the runtime computes with, to the bit."""
        codes, grid = self.format.unpack(self.parts, self.shape)
        return self.format.decode(codes, grid)

    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(p.numel() * p.element_size() for p in self.parts.values())

    def rows(self, index: Tensor) -> Compressed:
        """The same weight with its rows taken in another order."""
        take = getattr(self.format, "take", None)
        each = {} if take else {k: p.index_select(0, index) for k, p in self.parts.items()}
        parts = take(self.parts, self.shape, index) if take else each
        return Compressed(self.spec, (len(index), self.shape[1]), self.format, parts)


class Exporter(Protocol):
    """Where the bytes go: one kind of file or folder. `model`: a lighten.model.Model.

    holds: "language models". suffix: of the output's name, "" for a folder. The layers in `weights`
    and `specs` are named as in the state dict; all others, and all other tensors, are carried over
    as they are.
    """

    name: str
    holds: str
    suffix: str

    def refuses(self, model: Any) -> str | None:
        """None, or why this target cannot hold this model at all."""

    def accepts(self, spec: Spec, layer: Layer, model: Any) -> str | None:
        """None, or why this target cannot store this layer so."""

    def write(self, model: Any, weights: Mapping[str, Compressed], path: Path) -> None:
        """Write the whole output, or nothing; raises UserError."""

    def read(self, path: Path, model: Any) -> Mapping[str, Tensor]:
        """What was written of `model`: state-dict names and shapes -> the numbers that the runtime
        computes with, loaded one at a time."""

    def nbytes(self, model: Any, specs: Mapping[str, Spec]) -> int:
        """Bytes of all files that write would make: exact."""

    def fixed_bytes(self, model: Any) -> int:
        """Bytes that depend on no layer's spec. With the layer_bytes: exact or a little more."""

    def layer_bytes(self, model: Any, layer: Layer, spec: Spec) -> int:
        """Bytes that a layer adds to the output."""

    def rounds_inputs(self, model: Any, layer: Layer, spec: Spec) -> int | None:
        """How many inputs share a scale where the runtime rounds them to 8 bits, or None."""

    def notes(self, model: Any) -> tuple[str, ...]:
        """What a reader of the output should know."""


class NetworkExporter(Protocol):
    """Where the bytes of a lighten.network.Network or a lighten.quantized.Quantized go.

    holds: "networks". suffix: of the output's name, "" for a folder.
    """

    name: str
    holds: str
    suffix: str

    def refuses(self, model: Any) -> str | None:
        """None, or why this target cannot hold it at all: all that is no network is refused."""

    def write(self, network: Any, path: Path) -> None:
        """Write the whole output, or nothing; two writes are byte-identical; raises UserError."""

    def read(self, path: Path) -> Mapping[str, Tensor]:
        """What was written: state-dict names and shapes -> the numbers that are computed with."""

    def nbytes(self, network: Any) -> int:
        """Bytes of all files that write would make: exact."""

    def notes(self, network: Any) -> tuple[str, ...]:
        """What a reader of the output should know."""


@dataclass(frozen=True)
class Candidate:
    """One thing that could be done to one unit.

    unit: name of a layer (or of layers tied by an axis). specs: layer -> Spec text. error: nats of
    KL divergence where `measured` or first-order, see Plan.predicted. cost: {"bytes": ...}.
    """

    unit: str
    specs: Mapping[str, str]
    error: float
    cost: Mapping[str, float]
    width: int | None = None


@dataclass(frozen=True)
class Plan:
    """Layer -> Spec text; axis -> kept width; what is expected of it. JSON is the only recipe."""

    specs: Mapping[str, str]
    widths: Mapping[str, int] = field(default_factory=dict)
    predicted: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        body = {"specs": self.specs, "widths": self.widths, "predicted": self.predicted}
        return json.dumps(body, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        try:
            body = json.loads(text)
            specs = {str(k): str(Spec.parse(v)) for k, v in body["specs"].items()}
            return cls(specs, dict(body.get("widths", {})), dict(body.get("predicted", {})))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WrongUse(f"this is not a plan: {error}", "see docs/concepts/plan.md") from error


@dataclass(frozen=True, eq=False)
class Member:
    """Where an axis lies in one tensor of the state dict.

    index: (width, k) int64: unit i of the axis owns positions index[i] along dimension `dim`. role:
    "writes" (these outputs of a weight are the axis), "reads" (these inputs of a weight), "carries"
    (one number a channel: bias, norm, running mean, learned scale).
    """

    parameter: str
    dim: int
    index: Tensor
    role: str


@dataclass(frozen=True, eq=False)
class Axis:
    """Channels, heads or groups of a network that live and die together, unit by unit.

    name: the parameter that writes it first (`layer1.0.conv1.weight`). width: its units. kind: what
    a unit is: "channels", "heads", "groups". locked: None, or why no unit can be removed.
    """

    name: str
    width: int
    kind: str
    members: tuple[Member, ...]
    locked: str | None = None


_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SPENT = {"macs": "macs", "mac": "macs", "params": "params", "parameters": "params", "ms": "ms"}


@dataclass(frozen=True)
class Budget:
    """A limit in what the user measures.

    unit: "bytes" or "share" (of the bytes) of the file, "bpw", or for networks "macs", "params",
    "ms" (of one input, in the real runtime). relative: the value is a share of what it is now.

    >>> Budget.parse("90MB")
    Budget(value=90000000.0, unit='bytes', relative=False)
    >>> Budget.parse("4.5bpw").limit(weights=1_000_000, size_before=4_000_000)
    562500
    >>> Budget.parse("25%").limit(weights=1_000_000, size_before=4_000_000)
    1000000
    >>> Budget.parse("0.5 macs"), Budget.parse("60M macs").value, Budget.parse("50% ms").relative
    (Budget(value=0.5, unit='macs', relative=True), 60000000.0, True)
    """

    value: float
    unit: str
    relative: bool = False

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "80MB", "80MiB", "4.5bpw", "25%"; "0.5 macs" (half of them), "60M macs", "50% macs"
        and likewise "params"; "12ms", "50% ms", "0.5x ms". Raises WrongUse."""
        hint = (
            'write "80MB" (file size), "4.5bpw" (bits per weight) or "25%" (of the size now); '
            'for a network also "0.5 macs", "2M params", "12ms" or "50% ms"'
        )
        m = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z%]*)\s*([a-zA-Z]*)\s*", text)
        if not m or not math.isfinite(float(m[1])) or float(m[1]) <= 0:
            raise WrongUse(f"budget `{text}` is not a positive amount with a unit", hint)
        value, unit, of = float(m[1]), m[2].lower(), m[3].lower()
        if not of and unit in _UNITS:
            return cls(value * _UNITS[unit], "bytes")
        if not of and unit == "bpw":
            return cls(value, "bpw")
        if unit == "%" and (not of or of == "bytes"):
            return cls(value / 100, "share")
        share, unit = (unit, of) if of else ("", unit)
        if unit in _SPENT and share in ("%", "x"):
            return cls(value / (100 if share == "%" else 1), _SPENT[unit], True)
        if unit == "ms" and not share:
            return cls(value, "ms")
        if unit in _SPENT and share in _COUNTS and unit != "ms":
            # nobody has a network of one multiply-add: up to 1 it is a share
            relative = not share and value <= 1
            return cls(value * _COUNTS[share], _SPENT[unit], relative)
        raise WrongUse(f"budget `{text}` has no unit that lighten knows", hint)

    def limit(self, weights: int, size_before: int) -> int:
        """The limit in bytes of the exported file, for a model of so many weights and bytes.

        Raises WrongUse for a budget that is not one of bytes.
        """
        if self.unit == "bytes":
            return int(self.value)
        if self.unit == "bpw":
            return int(self.value * weights / 8)
        if self.unit == "share":
            return int(self.value * size_before)
        raise WrongUse(
            f"a language model's budget is not in {self.unit}",
            'write "80MB" (file size), "4.5bpw" (bits per weight) or "25%" (of the size now)',
        )

    def amount(self, now: float) -> float:
        """The limit in the budget's own unit, for a network that spends `now`."""
        return self.value * now if self.relative or self.unit == "share" else self.value


def tensor_bytes(t: Tensor) -> Tensor:
    """The bytes of t as uint8, its first dimension kept."""
    return t.contiguous().view(torch.uint8).reshape(t.shape[0], -1)
