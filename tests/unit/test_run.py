"""The run directory: resumed, damaged, killed, contended."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten import preflight as preflight_module
from lighten.errors import BadInput, ChangedRequest, NoRoom, UserError, WrongUse
from lighten.preflight import available_memory, peak_memory, preflight
from lighten.progress import be_quiet
from lighten.run import Run

sys.path.insert(0, str(Path(__file__).parent))
from toy_run import REQUEST, snapshot, work


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    work(folder)
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize(("how", "least"), [("boundaries", 60), ("moments", 10)])
def test_killed_anywhere_it_resumes_to_the_same_bytes(tmp_path: Path, how: str, least: int) -> None:
    script = Path(__file__).parent / "toy_run.py"
    command = [sys.executable, str(script), str(tmp_path), how]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(out.stdout)
    assert found["differing"] == []
    assert found["kills"] >= least  # a fast machine ends some runs before the random moment comes


damages = st.lists(
    st.tuples(
        st.integers(0, 10**6),  # which file
        st.sampled_from(["cut", "flip", "delete", "garbage"]),
        st.floats(0, 1, exclude_max=True),  # where in it
        st.integers(1, 255),
    ),
    min_size=1,
    max_size=3,
)


@given(damages=damages)
@settings(max_examples=80, deadline=None)
def test_whatever_is_damaged_is_computed_again(
    damages: list[tuple[int, str, float, int]],
    undisturbed: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    be_quiet()
    folder = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(undisturbed, folder)
    for which, how, where, value in damages:
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "request.json"]
        path = files[which % len(files)]
        data = bytearray(path.read_bytes())
        spot = int(where * len(data))
        if how == "delete":
            path.unlink()
            continue
        if how == "cut":
            del data[spot:]
        elif how == "flip" and data:
            data[spot] ^= value
        elif how == "garbage":
            data[spot:spot] = bytes([value]) * 3
        path.write_bytes(data)
    work(folder)
    be_quiet(False)
    after, expected = snapshot(folder), snapshot(undisturbed)
    # Bytes added behind the last whole line are not read; they stay until the next append.
    assert after.pop("candidates.jsonl").startswith(expected.pop("candidates.jsonl"))
    assert after == expected


def test_a_stored_stage_is_not_run_again(undisturbed: Path) -> None:
    def never() -> None:
        raise AssertionError("it was run again")

    with Run.open(undisturbed, REQUEST) as run:
        assert run.json("metrics", never) == {"bytes": 12.5, "worse": None}
        assert run.file("model", never).is_dir()


def test_a_damaged_file_is_said_and_computed_again(tmp_path: Path, capfd: object) -> None:
    with Run.open(tmp_path / "run", {}) as run:
        run.json("plan", lambda: 1)
        (tmp_path / "run/plan.json").write_text("2\n")
        assert run.json("plan", lambda: 3) == 3
    assert "plan.json" in capfd.readouterr().err  # type: ignore[attr-defined]


def test_a_result_for_another_given_is_computed_again(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", {}) as run:
        assert run.json("weights/a", lambda: "as q4_0", given={"spec": "q4_0"}) == "as q4_0"
        assert run.json("weights/a", lambda: "unused", given={"spec": "q4_0"}) == "as q4_0"
        assert run.json("weights/a", lambda: "as q8_0", given={"spec": "q8_0"}) == "as q8_0"


def test_tensors_come_back_to_the_bit(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    values = {"a": base, "shares": base[:2], "turned": base.T, "h": base.bfloat16(), "0": base[:0]}
    with Run.open(tmp_path / "run", {}) as run:
        run.tensors("weights/model.layers.0", lambda: values)
    with Run.at(tmp_path / "run") as run:
        back = run.tensors("weights/model.layers.0", dict)
    assert back.keys() == values.keys()
    assert all(torch.equal(back[k], values[k]) for k in values)


def test_a_failed_stage_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise ValueError("no")

    with Run.open(tmp_path / "run", {}) as run:
        with pytest.raises(ValueError, match="no"):
            run.file("exports/model.gguf", fail)
        assert run.status()["done"] == []
        assert not list((tmp_path / "run").rglob("*.gguf"))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("os error 28")])
def test_a_full_disk_is_said(tmp_path: Path, error: Exception) -> None:
    def fail(path: Path) -> None:
        raise error

    with Run.open(tmp_path / "run", {}) as run, pytest.raises(NoRoom, match="disk is full"):
        run.file("exports/model.gguf", fail)


def test_another_request_is_refused_and_the_fields_are_named(tmp_path: Path) -> None:
    Run.open(tmp_path / "run", {"budget": "80MB", "data": {"n": 1}, "seed": 0}).close()
    with pytest.raises(ChangedRequest) as caught:
        Run.open(tmp_path / "run", {"budget": "80MB", "data": {"n": 2}, "max_kld": None})
    assert "data.n: 1 -> 2" in caught.value.hint
    assert "seed: 0 -> unset" in caught.value.hint
    assert "budget" not in caught.value.hint
    with pytest.raises(ChangedRequest, match="lighten plan"):
        Run.open(tmp_path / "run", {"budget": "70MB", "data": {"n": 1}, "seed": 0})
    Run.open(tmp_path / "run", {"seed": 0, "budget": "80MB", "data": {"n": 1}}).close()


def test_two_processes_cannot_share_a_run(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", {}):
        with pytest.raises(WrongUse, match=f"in use by another process .process {os.getpid()}."):
            Run.open(tmp_path / "run", {})
        assert Run.at(tmp_path / "run", lock=False).status()["done"] == []
    Run.open(tmp_path / "run", {}).close()


def test_a_run_that_was_opened_to_be_read_writes_nothing(undisturbed: Path) -> None:
    run = Run.at(undisturbed, lock=False)
    assert len(run.read("candidates")) == 9
    with pytest.raises(RuntimeError):
        run.json("more", lambda: 1)
    with pytest.raises(RuntimeError):
        run.append("candidates", [{}])


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(WrongUse, match=r"thesis\.tex"):
        Run.open(tmp_path, {})
    with pytest.raises(WrongUse, match="is not a run"):
        Run.at(tmp_path)
    with pytest.raises(WrongUse, match="cannot make"):
        Run.open(tmp_path / "thesis.tex" / "run", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_a_damaged_request_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "request.json").write_text(text, encoding="latin-1")
    with pytest.raises(BadInput, match=r"request\.json"):
        Run.open(tmp_path, {})


@pytest.mark.parametrize("key", ["../out", "/etc/x", "a/../b", "a//b", "request.json", ".lock"])
def test_keys_stay_inside(tmp_path: Path, key: str) -> None:
    with Run.open(tmp_path / "run", {}) as run, pytest.raises(WrongUse):
        run.file(key, lambda path: path.write_text("") and None)


@given(keys=st.lists(st.text(min_size=1, max_size=300), min_size=2, max_size=2, unique=True))
@settings(max_examples=30, deadline=None)
def test_any_layer_name_has_a_file_of_its_own(
    keys: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    keys = [key.replace("/", "|") for key in keys]
    with Run.open(tmp_path_factory.mktemp("names") / "run", {}) as run:
        if keys[0] != keys[1] and not {".", ".."} & set(keys):
            run.json(f"weights/{keys[0]}", lambda: 0)
            assert run.json(f"weights/{keys[1]}", lambda: 1) == 1
            assert run.json(f"weights/{keys[0]}", lambda: 2) == 0


def test_status_says_what_is_done(undisturbed: Path) -> None:
    status = Run.at(undisturbed, lock=False).status()
    assert status["request"] == REQUEST
    assert status["rows"] == {"candidates": 9}
    done = {stage["key"]: stage for stage in status["done"]}
    assert set(done) >= {"plan.json", "model", "exports/model.gguf", "weights/layer/0.bin"}
    assert done["exports/model.gguf"]["bytes"] == 15000
    assert all(stage["seconds"] >= 0 for stage in done.values())


def test_preflight_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preflight(tmp_path / "new/run", disk=1, memory=1)
    usage = namedtuple("usage", "total used free")(0, 0, 5 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(NoRoom, match=r"90 MB .* 5 MB are free") as caught:
        preflight(tmp_path / "run", disk=90 * 10**6)
    assert "free 85 MB" in caught.value.hint
    monkeypatch.setattr(preflight_module, "available_memory", lambda: 10**9)
    with pytest.raises(NoRoom, match="1,500 MB of memory, but 1,000 MB"):
        preflight(tmp_path / "run", memory=15 * 10**8)
    (tmp_path / "file").write_text("")
    with pytest.raises(WrongUse, match="is a file"):
        preflight(tmp_path / "file/run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_memory_is_known_without_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    if sys.platform != "win32":
        assert (available_memory() or 0) > 10**7
        assert (peak_memory() or 0) > 10**7


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write anywhere")
def test_an_unwritable_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    for begin in (lambda p: preflight(p), lambda p: Run.open(p, {}).close()):
        with pytest.raises(UserError, match="locked"):
            begin(tmp_path / "locked" / "run")
