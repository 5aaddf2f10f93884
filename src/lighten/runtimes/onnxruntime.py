"""onnxruntime: opens an ONNX file, computes with it, says how fast it is and what memory it takes.

What is timed runs in a process of its own, so that its memory is measured apart and torch's threads
stay out of it. Errors: MissingPackage without the package, BadInput without the file, BadOutput
when onnxruntime refuses the file or dies.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lighten.errors import BadInput, BadOutput, MissingPackage, WrongUse
from lighten.runtimes import child_main, onnxruntime_child

_INSTALL = "pip install lighten[onnx]"


@dataclass(frozen=True)
class Latency:
    """Of single runs, in milliseconds. peak_rss_bytes: of the whole process, about 50 MB of
    interpreter and library in it, opening and three runs included."""

    p50: float
    p90: float
    p99: float
    runs: int
    peak_rss_bytes: int


class Session:
    """An open file, in this process. Not for timing: torch's threads are here too."""

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        file = _file(path)
        _positive(threads=threads)
        try:
            self.session = onnxruntime_child.session(str(file), threads)
        except ImportError as error:
            raise MissingPackage(f"`onnxruntime` does not load: {error}", _INSTALL) from error
        except Exception as error:  # onnxruntime has a dozen kinds of its own
            raise BadOutput(f"onnxruntime cannot open {path}: {_first(error)}") from error
        self.path = path
        self.names = tuple(value.name for value in self.session.get_inputs())

    @property
    def shapes(self) -> tuple[tuple[int | None, ...], ...]:
        """Of each input; None for a dimension that may have any size."""
        given = (value.shape for value in self.session.get_inputs())
        return tuple(tuple(n if isinstance(n, int) else None for n in shape) for shape in given)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """All outputs, for the inputs in the file's order; raises WrongUse, BadOutput."""
        if len(inputs) != len(self.names):
            raise WrongUse(
                f"{self.path} has {len(self.names)} inputs and {len(inputs)} were given",
                f"in this order: {', '.join(self.names)}",
            )
        given = {n: x.detach().cpu().numpy() for n, x in zip(self.names, inputs, strict=True)}
        try:
            found = self.session.run(None, given)
        except Exception as error:
            raise BadOutput(f"onnxruntime cannot run {self.path}: {_first(error)}") from error
        return [torch.from_numpy(np.asarray(x)) for x in found]


def available() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def check(path: str | Path, *, timeout: float = 300) -> dict[str, Any]:
    """Open the file and run it once, batch 1; {"inputs": {name: shape}, "outputs": ...}."""
    return _child("check", {"path": str(_file(path))}, f"{path}", timeout)


def run(path: str | Path, inputs: Sequence[Tensor] | Tensor, *, threads: int = 1) -> list[Tensor]:
    """All outputs of the file for its inputs in order."""
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    return Session(path, threads)(*given)


def operators(path: str | Path) -> dict[str, int]:
    """Operator -> how many of it onnxruntime runs, after it has optimised the graph for this CPU.

    Shows what was fused: QLinearConv instead of Conv between QuantizeLinear and DequantizeLinear.
    """
    file = _file(path)
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise MissingPackage(f"onnx or onnxruntime does not load: {error}", _INSTALL) from error
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        try:
            onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BadOutput(f"onnxruntime cannot open {path}: {_first(error)}") from error
        graph = onnx.load(options.optimized_model_filepath).graph
    return dict(sorted(Counter(node.op_type for node in graph.node).items()))


def latency(
    path: str | Path,
    *,
    threads: int = 1,
    seconds: float = 2.0,
    batch: int = 1,
    timeout: float = 600,
) -> Latency:
    """Time of single runs on numbers of one seed, after warming up."""
    found = latencies({"it": path}, threads=threads, seconds=seconds, batch=batch, timeout=timeout)
    return found["it"]


def latencies(
    files: Mapping[str, str | Path],
    *,
    threads: int = 1,
    seconds: float = 2.0,
    batch: int = 1,
    timeout: float = 600,
) -> dict[str, Latency]:
    """The same for several files in turns, about `seconds` each: what else the machine does then
    slows all alike, and their ratios are fair."""
    _positive(threads=threads, batch=batch, files=len(files))
    if not seconds > 0:
        raise WrongUse(f"{seconds:g} seconds of timing", "give more than 0")
    paths = {name: str(_file(path)) for name, path in files.items()}
    request = {"threads": threads, "batch": batch}
    about = ", ".join(str(p) for p in files.values())
    times = _child("latencies", request | {"files": paths, "seconds": seconds}, about, timeout)
    answer = {}
    for name, path in paths.items():
        memory = _child("memory", request | {"path": path}, path, timeout)
        answer[name] = _summary(times[name], int(memory["peak_rss_bytes"]))
    return answer


def profile(
    path: str | Path, *, threads: int = 1, seconds: float = 1.0, batch: int = 1,
    timeout: float = 600,
) -> dict[str, float]:  # fmt: skip
    """Node of the optimised graph -> microseconds that its kernel takes: the mean of the middle
    half of the runs, for the profiler counts in whole ones."""
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "path": str(_file(path)), "threads": threads, "batch": batch, "seconds": seconds,
            "least": 8, "prefix": str(Path(folder) / "profile"),
        }  # fmt: skip
        times = _child("profile", request, f"{path}", timeout)
    return {name: _middle(runs[3:] or runs) for name, runs in times.items()}


def _middle(runs: Sequence[float]) -> float:
    quarter = len(runs) // 4
    return statistics.fmean(sorted(runs)[quarter : len(runs) - quarter])


def _summary(times: Sequence[float], peak: int) -> Latency:
    p50, p90, p99 = (float(np.percentile(times, p)) for p in (50, 90, 99))
    return Latency(p50, p90, p99, len(times), peak)


def _positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise WrongUse(f"{name} is {count}", "it must be at least 1")


def _file(path: str | Path) -> Path:
    if not available():
        raise MissingPackage("timing ONNX needs the package `onnxruntime`", _INSTALL)
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"there is no file `{path}`", "give the path of an .onnx file")
    return path.resolve()


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _child(task: str, request: Mapping[str, Any], about: str, timeout: float) -> dict[str, Any]:
    """One task in one process."""
    try:
        done = subprocess.run(
            [sys.executable, str(child_main.__file__), str(onnxruntime_child.__file__)],
            input=json.dumps({"task": task, **request}),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            env=dict(os.environ),
        )
    except subprocess.TimeoutExpired as error:
        raise BadOutput(
            f"onnxruntime did not finish `{task}` of {about} within {timeout:g} s",
            "the machine may be busy: give a longer timeout",
        ) from error
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise BadOutput(
            f"onnxruntime was ended by {name} during `{task}` of {about}",
            "SIGKILL mostly means too little memory, SIGSEGV a file it cannot take",
        )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {}
    if "answer" in answer:
        result: dict[str, Any] = answer["answer"]
        return result
    if answer.get("why") in ("ImportError", "ModuleNotFoundError"):
        raise MissingPackage(f"`onnxruntime` does not load: {answer['failed']}", _INSTALL)
    lines = (answer.get("failed") or done.stderr).strip().splitlines()
    raise BadOutput(
        f"onnxruntime cannot {task} {about}: {lines[-1] if lines else 'no message'}",
        "is it an ONNX file for a newer onnxruntime?",
    )
