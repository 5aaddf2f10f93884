"""`lighten distill --tune` dies by SIGKILL wherever it may and goes on to the same student."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

pytest.importorskip("lightning", reason="learning needs lightning")
pytest.importorskip("optuna", reason="tuning needs optuna")

from lighten import progress
from lighten.cli import main
from small_networks import SIDE, images, trained

KILLER = Path(__file__).with_name("killed_distillation.py")
TIMES = {"seconds", "minutes", "p50_ms", "p99_ms", "peak_memory_bytes", "load_seconds"}

FEW = ("before:made.json", "ended:1", "state:2")
ALL = (
    "after:student", "before:made.json", "report:2", "report:5", "ended:1", "ended:1", "ended:2",
    "before:tuned.json", "state:1", "state:3", "before:learned.json", "before:taught",
    "after:taught", "after:model", "before:metrics.json",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _as_it_was(one_thread: None) -> Iterator[None]:
    yield
    progress.be_quiet(False)


def timeless(value: Any) -> Any:
    """Facts without what a clock says."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("places", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_anywhere_it_goes_on_to_the_same_student(
    places: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    x = images(160)
    (tmp_path / "nets.py").write_text("from test_distill import deep\n")
    np.savez(tmp_path / "data.npz", images=x.numpy(), labels=trained()(x).argmax(1).numpy())
    monkeypatch.chdir(tmp_path)
    line = ["distill", "nets.py:deep", "--student", "half depth, half width", "--data", "data.npz",
            "--size", str(SIDE), "--length", "20steps", "--learn-from", "logits:1,labels:0.5",
            "--tune", "4", "--augment", "none", "--batch", "16", "--samples", "40", "--json",
            "--quiet"]  # fmt: skip
    assert main([*line, "--out", "whole"]) == 0
    whole = json.loads(capsys.readouterr().out)
    here = [*sys.path[:1], str(KILLER.parent), str(KILLER.parent.parent)]
    child = subprocess.run(
        [sys.executable, KILLER, json.dumps([*line, "--out", "killed"]), *places],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(here)},
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert main([*line, "--out", "killed"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert timeless(again) == timeless(whole)
    for name in ("taught.safetensors", "student", "model"):
        found = [tmp_path / run / name for run in ("whole", "killed")]
        files = [sorted(p for p in f.rglob("*") if p.is_file()) or [f] for f in found]
        assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]], name
    rows = [(tmp_path / r / "learning" / "history.jsonl").read_text() for r in ("whole", "killed")]
    assert rows[0] == rows[1]
    assert not list((tmp_path / "killed").rglob("step-*"))
