"""Distillation on two devices: the second process follows in the run that the first one holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("lightning", reason="learning needs lightning")

import lighten
from lighten.devices import several
from lighten.errors import BadOutput, ChangedRequest, WrongUse
from lighten.followed_run import HELD, FollowedRun, check_processes, follows, led
from lighten.run import Run

PROGRAM = Path(__file__).parent / "distilling_in_two.py"


@pytest.mark.slow
@pytest.mark.timeout(900)  # of a busy machine
def test_two_processes_distill_and_recover_what_one_does(tmp_path: Path) -> None:
    facts: dict[str, list[dict[str, Any]]] = {}
    for devices in ("1", "2"):
        home = tmp_path / devices
        home.mkdir()
        done = subprocess.run(
            [sys.executable, str(PROGRAM), str(home), devices],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        files = sorted(home.glob("facts-*.json"))
        facts[devices] = [json.loads(path.read_text()) for path in files]
        assert (home / "run" / "report.html").is_file()
        assert list((home / "recover").glob("step-8*"))
    (one,), (first, second) = facts["1"], facts["2"]
    assert first == second
    for name in ("sums", "recovered", "after"):
        assert first[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4)
    assert first["metrics"]["learning"][0]["steps"] == 8
    assert first["metrics"]["after"]["accuracy"] == one["metrics"]["after"]["accuracy"]


# -- one process that takes the place of the other -------------------------------------------------
@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that this process's parent seems to hold, with one result in it."""
    folder = tmp_path / "run"
    with Run.open(folder, {"length": "2steps"}) as run:
        run.json("stored", lambda: 1)
    monkeypatch.setenv(HELD, f"{os.getppid()}:{folder.resolve()}")
    return folder


def test_a_process_that_follows_stores_nothing(held: Path) -> None:
    assert follows(held)
    assert not follows(held / "other")
    check_processes(held)
    with Run.open(held, {"length": "2steps"}), FollowedRun.of(held, {"length": "2steps"}) as run:
        before = sorted(held.iterdir())
        assert run.json("stored", lambda: 2) == 1
        assert run.json("other", lambda: 3) == 3
        assert torch.equal(run.tensors("t", lambda: {"x": torch.ones(2)})["x"], torch.ones(2))
        run.append("stages", [{"stage": "learn"}])
        assert sorted(held.iterdir()) == before


def test_it_waits_for_what_the_first_process_stores(
    held: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FollowedRun.of(held, {"length": "2steps"}) as run, Run.open(held, run.request) as first:
        monkeypatch.setattr("time.sleep", lambda _: first.json("metrics", lambda: {"after": 1}))
        run.wait("metrics.json")
        assert run.json("metrics", dict) == {"after": 1}
    monkeypatch.setenv(HELD, f"1234567:{held.resolve()}")
    with pytest.raises(BadOutput, match="ended before the run was done"):
        FollowedRun.of(held, {"length": "2steps"}).wait("never.json")


def test_another_request_is_told_with_what_may_be_wrong(held: Path) -> None:
    with pytest.raises(ChangedRequest, match="another length, student") as error:
        FollowedRun.of(held, {"length": "3steps", "student": "x"})
    assert "torch.manual_seed" in error.value.hint


def test_what_a_process_starts_follows_it_for_as_long_as_it_learns(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", {}) as run:
        with led(run):
            assert os.environ[HELD] == f"{os.getpid()}:{run.folder.resolve()}"
        assert HELD not in os.environ


# -- mistakes --------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "value"), [("LOCAL_RANK", "0"), ("SLURM_NTASKS", "2")])
def test_processes_that_others_started_are_refused_and_do_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    network, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.randn(40, 1, 2, 2)
    with pytest.raises(WrongUse, match="runs in several processes already"):
        lighten.distill(network, network, x, length="2steps", devices=2, accelerator="cpu",
                        out=tmp_path / "run")  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_trials_run_on_one_device(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    network, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.randn(40, 1, 2, 2)
    with pytest.raises(WrongUse, match="trials run on one device, and devices=2"):
        lighten.distill(network, network, x, length="2steps", devices=2, accelerator="cpu",
                        learn_from="logits:1,hidden:1", tune=2, out=tmp_path / "run")  # fmt: skip


@pytest.mark.parametrize(
    ("devices", "more"), [(1, False), (2, True), ("0,1", True), ("3,", False), (-1, False)]
)
def test_how_many_devices_are_asked_for(devices: Any, more: bool) -> None:
    assert several(devices, "cpu") == more
    with pytest.raises(WrongUse, match="devices='many' cannot be"):
        several("many", "cpu")
