"""The examples run as they stand, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lighten.registry import exporters

FIRST, SECOND = "compress_language_model.py", "plan_budgets.py"


def run(root: Path, name: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, root / "examples" / name, *words]
    return subprocess.run([str(w) for w in command], capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def done(
    tiny: Callable[..., Path], repo_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """(the run, what the first example printed)."""
    model = tiny("llama", max_position_embeddings=1024)  # llama.cpp is timed on 512 tokens
    out = tmp_path_factory.mktemp("example") / "run"
    words = (model, "--budget", "60%", "--out", out, "--samples", "4", "--length", "32")
    return out, run(repo_root, FIRST, *words)


def test_a_model_is_compressed_from_python(done: tuple[Path, Any]) -> None:
    out, found = done
    assert found.returncode == 0, found.stderr
    exported = out / "exports" / "run.gguf"
    assert f"file            {exported}" in found.stdout
    assert exported.is_file()
    assert "nats per token" in found.stdout
    assert "model.layers.0.mlp.down_proj.weight" in found.stdout


def test_budgets_are_planned_from_the_run(done: tuple[Path, Any], repo_root: Path) -> None:
    found = run(repo_root, SECOND, done[0], "55%", "75%", "1%")
    assert found.returncode == 0, found.stderr
    head, small, large, impossible = found.stdout.splitlines()
    assert "nats/token" in head
    mb, nats = (float(word) for word in small.split()[1:3])
    more_mb, fewer_nats = (float(word) for word in large.split()[1:3])
    assert mb <= more_mb
    assert nats >= fewer_nats
    assert "cannot be met" in impossible


def test_a_mistake_is_a_message_not_a_traceback(repo_root: Path, tmp_path: Path) -> None:
    found = run(repo_root, FIRST, tmp_path / "nothing.gguf")
    assert found.returncode == 2
    assert "hint:" in found.stderr
    assert "Traceback" not in found.stderr


def test_every_key_of_the_metrics_is_documented(done: tuple[Path, Any], repo_root: Path) -> None:
    page = (repo_root / "docs/reference/metrics-schema.md").read_text(encoding="utf-8")
    facts = json.loads((done[0] / "metrics.json").read_text())
    keys = set(facts) | set(facts["before"]) | set(facts["after"])
    keys |= {key for row in facts["plans"] for key in row}
    assert not {key for key in keys if f"`{key}`" not in page}
    assert exporters["gguf"].suffix == ".gguf"


def test_every_file_of_a_run_is_documented(
    done: tuple[Path, Any], undocumented: Callable[[Path], set[str]]
) -> None:
    assert not undocumented(done[0])
