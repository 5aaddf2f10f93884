"""Small networks compressed end to end, on times made up so that a busy machine changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from lighten import front, job, network_cost, network_structure
from lighten.latency_operators import Operator
from lighten.pipeline import Result
from lighten.runtimes import onnxruntime
from lighten.samples import samples
from small_networks import images, labels, trained

X = images(96)
Y = labels(trained(), X)
EXAMPLE = X[:2]


def made_up(path: Path, **_: Any) -> onnxruntime.Latency:
    """Milliseconds in proportion to the weights in a file, whatever their type."""
    import onnx

    tensors = onnx.load(path).graph.initializer
    size = sum(math.prod(t.dims) for t in tensors if len(t.dims) > 1)
    return onnxruntime.Latency(0.1 + size / 1e4, 0.2 + size / 1e4, 0.3 + size / 1e4, 9, 10**8)


def in_turns(files: Mapping[str, Path], **_: Any) -> dict[str, onnxruntime.Latency]:
    return {name: made_up(path) for name, path in files.items()}


class Table:
    """Times of operators that have little to do with those of files."""

    def __init__(self, path: Path, threads: int, int8: bool) -> None:
        pass

    def measure(self, operators: Iterable[Operator]) -> None:
        pass

    def milliseconds(self, operator: Operator) -> float:
        o = operator
        return 1e-5 * (o.inputs + o.outputs + 3) * math.prod(o.kernel)


def make_steady(patch: pytest.MonkeyPatch) -> None:
    """No clock is asked."""
    patch.setattr(onnxruntime, "latency", made_up)
    patch.setattr(onnxruntime, "latencies", in_turns)
    patch.setattr(network_cost, "LatencyTable", Table)


def compress(out: Path, module: nn.Module | None = None, **options: Any) -> Result:
    options.setdefault("data", (X, Y))
    return front.compress(module or trained(), EXAMPLE, out=out, **options)


def size(path: Path) -> int:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(p.stat().st_size for p in files)


def held_out() -> Tensor:
    return samples((X, Y)).held_out


def _work(*_: Any, **__: Any) -> Any:
    raise AssertionError("a finished run does no work")


def idle(patch: pytest.MonkeyPatch) -> None:
    for name in ("curves", "compensate", "narrow"):
        patch.setattr(network_structure, name, _work)
    for name in ("quantize_network", "all_outputs"):
        patch.setattr(job, name, _work)
    patch.setattr(network_cost, "speeds", _work)
    patch.setattr(network_cost, "_p50", _work)
