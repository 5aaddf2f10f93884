"""`lighten distill --tune` of a language model dies by SIGKILL wherever it may and goes on to the
same student."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

pytest.importorskip("lightning", reason="learning needs lightning")
pytest.importorskip("optuna", reason="tuning needs optuna")

from test_distill_killed import KILLER, timeless

from lighten import progress
from lighten.cli import main

FEW = ("before:made.json", "before:0.safetensors", "state:2")
ALL = (
    "before:student", "after:student", "after:0.safetensors", "report:2", "report:4", "ended:1",
    "ended:1", "before:tuned.json", "state:1", "state:3", "before:learned.json", "before:model",
    "after:model", "before:metrics.json",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _as_it_was(one_thread: None) -> Iterator[None]:
    yield
    progress.be_quiet(False)


@pytest.mark.parametrize("places", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_anywhere_it_goes_on_to_the_same_student(
    places: tuple[str, ...], tiny: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Line {i}: the quick fox sees {i * i} birds." for i in range(60)))
    monkeypatch.chdir(tmp_path)
    teacher = str(tiny("llama", num_hidden_layers=4))
    line = ["distill", teacher, "--student", "half depth, half width", "--data", "text.txt",
            "--length", "20steps", "--window", "32", "--batch", "4", "--samples", "8",
            "--learn-from", "topk:1:k=8,labels:0.5", "--tune", "3", "--rate", "0.001", "--json",
            "--quiet"]  # fmt: skip
    assert main([*line, "--out", "whole"]) == 0
    whole = json.loads(capsys.readouterr().out)
    child = subprocess.run(
        [sys.executable, KILLER, json.dumps([*line, "--out", "killed"]), *places],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert main([*line, "--out", "killed"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert timeless(again) == timeless(whole)
    for name in ("student", "model", "teacher"):
        found = [tmp_path / run / name for run in ("whole", "killed")]
        files = [sorted(p for p in f.rglob("*") if p.is_file()) for f in found]
        assert files[0]
        assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]], name
    rows = [(tmp_path / r / "learning" / "history.jsonl").read_text() for r in ("whole", "killed")]
    assert rows[0] == rows[1]
    assert not list((tmp_path / "killed").rglob("step-*"))
