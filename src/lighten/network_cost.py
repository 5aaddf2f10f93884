"""What a network costs: multiply-adds, parameters, bytes, and time in the runtime that will run it.

For each unit of a budget: how widths are predicted to cost, and how the real cost is taken.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lighten.costs import parameter_counts, size_terms
from lighten.errors import MissingPackage, WrongUse
from lighten.latency_table import LatencyTable
from lighten.latency_terms import latency_terms
from lighten.macs import macs
from lighten.network import Network
from lighten.progress import stage
from lighten.structure import Spend
from lighten.types import Axis, Budget

THREADS = 1
"""Of the runtime when it is timed. One is what phones and servers with many requests have, and it
does not depend on what else the machine does."""

SECONDS = 2.0
"""Of timing, for a file whose speed is told."""

Beside = tuple[Path, float]
"""The original's file, and the milliseconds that a budget takes it to have. Candidates are timed in
turns with it: a machine that is busier now than then would else meet, or miss, any share."""

SECONDS_A_TRY = 1.5
"""Of timing, for a file on the way to a budget."""


def sizes(network: Network) -> dict[str, Any]:
    """Parameters and multiply-adds of one example."""
    return {"parameters": network.parameters, "macs": round(macs(network).total)}


def speed(export: str, path: Path) -> dict[str, Any]:
    """Size of the file; milliseconds of single runs and peak memory where its runtime is here."""
    return speeds(export, {"it": path})["it"]


def speeds(export: str, files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """The same of several files, timed in turns: what else the machine does slows all alike."""
    facts: dict[str, dict[str, Any]] = {n: {"bytes": nbytes(path)} for n, path in files.items()}
    from lighten.runtimes import onnxruntime

    if export == "onnx" and onnxruntime.available():
        times = onnxruntime.latencies(files, threads=THREADS, seconds=SECONDS)
        for name, found in times.items():
            facts[name] |= {
                "p50_ms": found.p50, "p90_ms": found.p90, "p99_ms": found.p99,
                "peak_memory_bytes": found.peak_rss_bytes,
            }  # fmt: skip
    return facts


def nbytes(path: Path) -> int:
    """Of a file or of all files in a folder."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size


def check(limit: Budget, export: str) -> None:
    """Raise WrongUse or MissingPackage for a budget that cannot be measured."""
    if limit.unit == "bpw":
        raise WrongUse(
            "a network's budget is not in bits per weight",
            'write "80kB" (file size), "25%" (of it now), "0.5 macs", "2M params" or "50% ms"',
        )
    if limit.unit != "ms":
        return
    if export != "onnx":
        raise WrongUse(f"`{export}` has no runtime that is timed here", "--export onnx")
    from lighten.runtimes import onnxruntime

    if not onnxruntime.available():
        raise MissingPackage(
            "a budget in milliseconds needs the package `onnxruntime`", "pip install lighten[onnx]"
        )


def quantity(limit: Budget) -> str:
    """What of a measurement a budget limits."""
    return {"macs": "macs", "params": "parameters", "ms": "p50_ms"}.get(limit.unit, "bytes")


def now(limit: Budget, before: Mapping[str, Any]) -> float:
    """What the original spends, in the unit of the budget."""
    return float(before[quantity(limit)])


def counted(network: Network, axes: Sequence[Axis], unit: str) -> Spend:
    """Cost in "macs" or "params", which nothing has to be run for."""
    if unit == "params":
        terms, fixed = size_terms(network, axes, parameter_counts(network))
        return Spend(terms, fixed, lambda n: float(n.parameters))
    found = macs(network)
    terms, fixed = size_terms(network, axes, found.positions)
    rest = found.total - _at_full(terms, fixed, axes)  # what is no weight's: attention's products
    return Spend(terms, fixed + rest, lambda n: float(macs(n).total))


def spend(
    network: Network,
    axes: Sequence[Axis],
    limit: Budget,
    weight_bits: int,
    written: Callable[[Network, Path], None],
    table: Path,
    beside: Beside | None = None,
) -> Spend:
    """Predicted and real cost in the budget's unit.

    weight_bits: of weights of layers in the exported file, 32 for float. written: writes a network
    as it would be exported, its numbers quickly chosen. table: where latencies are kept. beside:
    what a candidate is timed in turns with, where a budget is a share of the time now.
    """
    if limit.unit in ("macs", "params"):
        return counted(network, axes, limit.unit)

    def real(measure: Callable[[Path], float]) -> Callable[[Network], float]:
        def actual(candidate: Network) -> float:
            with tempfile.TemporaryDirectory(prefix="lighten-") as folder:
                path = Path(folder) / "candidate.onnx"
                written(candidate, path)
                return measure(path)

        return actual

    if limit.unit == "ms":
        with stage("time operators"):
            terms, fixed = latency_terms(network, axes, times(table, weight_bits < 32))
        return Spend(terms, fixed, real(lambda path: taken(limit, path, beside)), tolerance=0.04)
    layers = {layer.name for layer in network.layers}
    each = {name: (weight_bits if name in layers else 32) / 8 for name in parameter_counts(network)}
    terms, fixed = size_terms(network, axes, each)
    return Spend(terms, fixed, real(lambda path: taken(limit, path)), tolerance=0.02)


def times(table: Path, integer: bool) -> LatencyTable:
    """The times of operators that are kept in a file, in int8 or in float."""
    return LatencyTable(table, THREADS, integer)


def taken(limit: Budget, path: Path, beside: Beside | None = None) -> float:
    """What a file, or a folder of files, really costs in the budget's unit: bytes or ms."""
    if limit.unit != "ms":
        return float(nbytes(path))
    return _p50(path, beside if limit.relative else None)


def _p50(path: Path, beside: Beside | None) -> float:
    from lighten.runtimes import onnxruntime

    if beside is None:
        return onnxruntime.latency(path, threads=THREADS, seconds=SECONDS_A_TRY).p50
    files = {"original": beside[0], "it": path}
    found = onnxruntime.latencies(files, threads=THREADS, seconds=SECONDS_A_TRY)
    return beside[1] * found["it"].p50 / found["original"].p50


def _at_full(terms: Sequence[Any], fixed: float, axes: Sequence[Axis]) -> float:
    widths = {axis.name: axis.width for axis in axes}
    return fixed + float(sum(term.cost(widths) for term in terms))
