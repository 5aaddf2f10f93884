"""Milliseconds of a network's operators, each shape measured once in onnxruntime on this machine.

Many one-operator graphs go into one model, and onnxruntime's profiler times each kernel: so a shape
costs milliseconds to measure, and conversions of layout at the edges of such a tiny graph, which a
whole network does not have, are not counted. All else (adding, pooling) is taken to be bound by
memory: one line in elements read and written.
"""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lighten.atomic import write_text
from lighten.errors import BadInput, BadOutput, WrongUse
from lighten.latency_operators import Operator
from lighten.latency_probe import probe, stream_probe
from lighten.runtimes import onnxruntime

_CHUNK_OPERATORS = 32
_CHUNK_BYTES = 64_000_000
_SECONDS = 0.03
"""Of runs, for each operator of a chunk."""


@dataclass
class LatencyTable:
    """Operator -> milliseconds at batch 1, kept in the JSON file `path`.

    int8: quantized inputs, weights and outputs. A file of another machine or onnxruntime is begun
    anew. Raises MissingPackage without onnxruntime, BadInput for a file that is no such table.
    """

    path: Path
    threads: int = 1
    int8: bool = False
    entries: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise WrongUse(f"{self.threads} threads", "at least 1")
        if not self.path.exists():
            return
        try:
            body = json.loads(self.path.read_text(encoding="utf-8"))
            if body["made_with"] == _made_with():
                self.entries = {str(k): float(v) for k, v in body["milliseconds"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                f"`{self.path}` is no latency table: {error!r}", "remove it, or name another file"
            ) from error

    def milliseconds(self, operator: Operator) -> float:
        """Of one operator; measured now where it is not yet known."""
        if operator.kind == "stream":
            self._stream()
            base, each = self.entries[self._key("base")], self.entries[self._key("each")]
            return base + each * operator.elements
        self.measure([operator])
        return self.entries[self._key(str(operator))]

    def total(self, operators: Iterable[Operator]) -> float:
        """Of a network that runs these one after another."""
        known = list(operators)
        self.measure(known)
        return sum(self.milliseconds(one) for one in known)

    def measure(self, operators: Iterable[Operator]) -> None:
        """Measure all of these that are not yet known, and write the file."""
        unknown = {
            key: one
            for one in operators
            if one.kind != "stream" and (key := self._key(str(one))) not in self.entries
        }
        for chunk in _chunks(unknown):
            self.entries |= self._timed(chunk)
            self._save()

    def _timed(self, chunk: Mapping[str, Operator]) -> dict[str, float]:
        model, marks = probe(list(chunk.values()), self.int8)
        times = self._profile(model, _SECONDS * len(chunk))
        found = {}
        for key, mark in zip(chunk, marks, strict=True):
            found[key] = _of(mark, times)
        return found

    def _stream(self) -> None:
        if self._key("each") in self.entries:
            return
        sizes = (20_000, 400_000)
        model, marks = stream_probe(sizes, self.int8)
        times = self._profile(model, 0.3)
        small, large = (_of(mark, times) for mark in marks)
        each = max(0.0, (large - small) / (3 * (sizes[1] - sizes[0])))
        self.entries[self._key("each")] = each
        self.entries[self._key("base")] = max(0.0, small - 3 * sizes[0] * each)
        self._save()

    def _profile(self, model: Any, seconds: float) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "probe.onnx"
            file.write_bytes(model.SerializeToString())
            return onnxruntime.profile(file, threads=self.threads, seconds=seconds)

    def _key(self, text: str) -> str:
        return f"{'int8' if self.int8 else 'float32'} {self.threads}t {text}"

    def _save(self) -> None:
        body = {"made_with": _made_with(), "milliseconds": dict(sorted(self.entries.items()))}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f"{self.path.name}.part")
        write_text(part, json.dumps(body, indent=1) + "\n")
        os.replace(part, self.path)


def _of(mark: str, times: Mapping[str, float]) -> float:
    """Milliseconds of a mark's nodes: onnxruntime adds to the names of those that it changed."""
    mine = re.compile(rf"{mark}(/clip)?(_nchwc|_token_\d+)*")
    found = [t for name, t in times.items() if mine.fullmatch(name)]
    if not found:
        raise BadOutput(
            f"onnxruntime's profile has no `{mark}` among {', '.join(times)}",
            "this onnxruntime names its nodes otherwise: try the one in constraints.txt",
        )
    return sum(found) / 1e3


def _chunks(operators: Mapping[str, Operator]) -> Iterator[dict[str, Operator]]:
    chunk: dict[str, Operator] = {}
    size = 0
    for key, one in operators.items():
        if chunk and (len(chunk) == _CHUNK_OPERATORS or size + one.bytes > _CHUNK_BYTES):
            yield chunk
            chunk, size = {}, 0
        chunk[key] = one
        size += one.bytes
    if chunk:
        yield chunk


def _made_with() -> dict[str, str]:
    """What decides how long an operator takes: processor and runtime."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            facts = dict(line.split(":", 1) for line in file if ":" in line)
        name = " ".join(v.strip() for k, v in facts.items() if k.strip() == "model name") or name
    except OSError:
        pass
    runtime = version("onnxruntime") if onnxruntime.available() else "none"
    return {"processor": name, "onnxruntime": runtime}
