"""How the same result is made again, and what it cost: look/provenance.json, of every run."""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lighten import stage_log
from lighten.cpu import INFO
from lighten.run import REQUEST, Run

PACKAGES = (
    "lighten", "torch", "numpy", "scipy", "transformers", "safetensors", "gguf", "xllamacpp",
    "onnx", "onnxruntime", "lightning", "optuna", "keras",
)  # fmt: skip
"""Packages whose versions may change a result, where they are installed."""


def provenance(
    run: Run, command: Sequence[str], *, model: Mapping[str, Any], data: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """{"command", "model", "data", "seed", "versions", "machine", "stages", "began", "ended"}.

    command: the words of the line that makes this run. model, data: at least source and digest.
    """
    began = (run.folder / REQUEST).stat().st_mtime
    return {
        "command": shlex.join(command),
        "model": dict(model),
        "data": dict(data),
        "seed": seed,
        "versions": versions(),
        "machine": machine(),
        "stages": stage_log.spent(run),
        "began": stage_log.moment(began),
        "ended": stage_log.moment(time.time()),
    }


def versions() -> dict[str, str]:
    """Package -> version, of those that are installed; and Python's."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """{"system", "processor", "cores", "threads", "memory_bytes", "accelerator"}.

    cores: that this process may use. threads: of torch. What is unknown is left out.
    """
    import torch

    found: dict[str, Any] = {"system": f"{platform.system()} {platform.release()}"}
    found["processor"] = _processor()
    found["cores"] = _cores()
    found["threads"] = torch.get_num_threads()
    found["memory_bytes"] = _memory()
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        found["accelerator"] = "Apple GPU (mps)"
    return {k: v for k, v in found.items() if v not in (None, "")}


def _processor(info: Path = INFO) -> str:
    """The model's name as the system tells it, else the architecture."""
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return f"{value.strip()} ({platform.machine()})"
    return platform.processor() or platform.machine()


def _cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory() -> int | None:
    """Bytes of memory of the machine."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no sysconf on Windows
        return None
