"""What a run directory holds, as far as it is there and can be read; a killed run too.

Nothing is computed here and nothing is written. Whatever is damaged is left out and named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lighten import stage_log
from lighten.report.words import Phrase
from lighten.run import Run

LOOK = ("layers", "axes", "curve", "differences", "provenance")


@dataclass(frozen=True)
class History:
    """What a training wrote down. rows: {"step", "loss", "rate", "held_out" where evaluated}."""

    name: str
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Facts:
    """All that a page is made of; see docs/reference/metrics-schema.md for the parts.

    kind: "text", "network", "distill" of runs, "model" of a model that is only looked at. look: the
    files of run/look by name. stages: {"stage", "seconds", "peak_memory_bytes"}. notes: of reading.
    """

    name: str
    kind: str
    finished: bool = True
    request: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    look: Mapping[str, Any] = field(default_factory=dict)
    histories: list[History] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    plan: Mapping[str, Any] = field(default_factory=dict)
    exported: list[str] = field(default_factory=list)
    notes: list[Phrase] = field(default_factory=list)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """A list of objects of look/<name>.json; what is no object in it is passed over."""
        found = self.look.get(name)
        found = found if isinstance(found, list) else []
        return [row for row in found if isinstance(row, dict)]

    def part(self, name: str) -> dict[str, Any]:
        """An object of look/<name>.json, empty where there is none."""
        found = self.look.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def of_text(self) -> bool:
        """Whether it is of a language model, compressed or taught."""
        return self.kind == "text" or (self.kind == "distill" and "window" in self.request)

    @property
    def export(self) -> str:
        """The exporter that wrote the result."""
        return str(self.request.get("export") or "")

    @property
    def model(self) -> str:
        """What the model is called."""
        source = self.request.get("source") or self.request.get("teacher") or ""
        if isinstance(source, Mapping):
            source = source.get("source") or ""
        last = str(source).rstrip("/\\").replace("\\", "/").rpartition("/")[2]
        return last or self.name


def of_run(folder: Path | str) -> Facts:
    """The facts of a run directory. Raises WrongUse where there is none, BadInput."""
    folder = Path(folder)
    run = Run.at(folder, lock=False)
    notes: list[Phrase] = []

    def read(path: Path, what: type) -> Any:
        if not path.is_file():
            return what()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if isinstance(found, what):
            return found
        notes.append(Phrase("note.damaged", {"file": path.relative_to(folder).as_posix()}))
        return what()

    finished = run.whole("metrics.json")
    metrics = read(folder / "metrics.json", dict) if finished else {}
    kind = _kind(run.request)
    if kind == "distill" and "teacher" in metrics:
        # what a reader wants side by side is teacher and student; how it began is a step
        steps = [{"step": "untaught", **metrics.get("before", {})},
                 {"step": "taught", **metrics.get("after", {})}]  # fmt: skip
        metrics = {**metrics, "before": metrics["teacher"], "steps": _shown(steps)}
    look = {}
    for name in LOOK:
        path = folder / "look" / f"{name}.json"
        found = read(path, list if name in ("layers", "axes", "curve") else dict)
        if found:
            look[name] = found
    plan = read(folder / "plan.json", dict)
    if "layers" not in look and (rows := _layers(run, plan)):
        look["layers"] = rows
    histories = [
        History(path.parent.relative_to(folder).as_posix(), rows)
        for path in sorted(folder.rglob("history.jsonl"))
        if (rows := _lines(path))
    ]
    exports = folder / "exports"
    names = (p.name for p in exports.iterdir()) if exports.is_dir() else ()
    exported = sorted(name for name in names if name != "README.md")  # the card beside them
    return Facts(
        folder.resolve().name, kind, finished, run.request, metrics, look, histories,
        _stages(run, look.get("provenance")), plan, exported, notes,
    )  # fmt: skip


def _kind(request: Mapping[str, Any]) -> str:
    if "teacher" in request or "student" in request:
        return "distill"
    return "network" if "inputs" in request else "text"


def _shown(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each step what says how good it is."""
    shown = ("step", "accuracy", "evaluate", "perplexity", "top1_agreement", "mean_kld",
             "relative_error")  # fmt: skip
    return [{key: step[key] for key in shown if key in step} for step in steps]


def _layers(run: Run, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Layers as far as stored candidates and the plan tell of them: bytes, predicted nats."""
    specs = plan.get("specs")
    specs = specs if isinstance(specs, dict) else {}
    rows: dict[str, dict[str, Any]] = {}
    for candidate in run.read("candidates"):
        name, cost = candidate.get("unit"), candidate.get("cost")
        tried = candidate.get("specs")
        if not isinstance(name, str) or not isinstance(cost, dict) or not isinstance(tried, dict):
            continue
        row = rows.setdefault(name, {"name": name})
        spec = tried.get(name)
        if spec == "keep":
            row["bytes_before"] = cost.get("bytes")
        if name in specs and spec == specs[name]:
            row["bytes_after"] = cost.get("bytes")
            row["format"] = str(spec).partition("@")[0]
            row["sensitivity"] = candidate.get("error")
    return sorted(rows.values(), key=lambda row: _natural(row["name"]))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """What sorts block 2 before block 10; words before numbers."""
    pieces = re.split(r"(\d+)", name)
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in pieces if p]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def _stages(run: Run, provenance: Any) -> list[dict[str, Any]]:
    told = provenance.get("stages") if isinstance(provenance, dict) else None
    if isinstance(told, list) and told:
        return [row for row in told if isinstance(row, dict)]
    if written := stage_log.spent(run):
        return written
    stages: dict[str, dict[str, Any]] = {}
    for done in run.status()["done"]:
        name = str(done["key"]).partition("/")[0].partition(".")[0]
        row = stages.setdefault(name, {"stage": name, "seconds": 0.0, "peak_memory_bytes": 0.0})
        row["seconds"] += done["seconds"] or 0.0
        row["peak_memory_bytes"] = max(row["peak_memory_bytes"], 1e6 * (done["peak_mb"] or 0.0))
    return list(stages.values())
