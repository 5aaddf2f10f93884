"""Runs of networks that are asked for again: finished, killed, damaged, or for something else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compressed_networks import X, compress, idle
from lighten import batchnorms, errors, network_structure
from lighten.network import Network
from lighten.pipeline import Result
from lighten.run import Run
from small_networks import images, trained

pytestmark = pytest.mark.usefixtures("steady")


def test_the_same_call_again_does_nothing(done: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    before = done.exported.read_bytes()
    idle(monkeypatch)
    again = compress(done.run, budget=" 0.5  macs")
    assert again.metrics == done.metrics
    assert again.exported == done.exported
    assert again.exported.read_bytes() == before
    for mine, theirs in zip(
        again.module.state_dict().values(), done.module.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "change",
    [
        {"budget": "0.6 macs"},
        {"quantize": "int8"},
        {"multiple": 4},
        {"export": "checkpoint"},
        {"data": X},
        {"module": trained(seed=3)},
    ],
)
def test_another_request_is_refused(done: Result, change: dict[str, Any]) -> None:
    with pytest.raises(errors.ChangedRequest, match="another request") as caught:
        compress(done.run, **{"budget": "0.5 macs", **change})
    assert next(iter(change)).replace("module", "model") in caught.value.hint


class Killer:
    """Ends the process, as it were, the first time that each result is about to be recorded."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.killed: list[str] = []
        record = Run._record

        def once(run: Run, line: dict[str, Any]) -> None:
            key = str(line.get("key"))
            if key not in self.killed:
                self.killed.append(key)
                raise KeyboardInterrupt
            record(run, line)

        patch.setattr(Run, "_record", once)


def test_killed_and_resumed_it_makes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"budget": "0.5 macs", "quantize": "int8", "export": "checkpoint"}
    whole = compress(tmp_path / "a" / "run", **options)
    killer = Killer(monkeypatch)
    found = None
    for _ in range(40):
        try:
            found = compress(tmp_path / "b" / "run", **options)
            break
        except KeyboardInterrupt:
            continue
    assert found is not None
    assert {"measured/original.json", "metrics.json", "curves.safetensors"} <= set(killer.killed)
    assert len(killer.killed) >= 11
    names = [
        {p.relative_to(r.run) for p in r.run.rglob("*") if p.is_file()} for r in (whole, found)
    ]
    assert names[0] == names[1]
    timed = {Path(n) for n in ("manifest.jsonl", ".lock", "report.html", "stages.jsonl")}
    timed |= {Path("look/provenance.json")}
    for name in names[0] - timed:
        assert (whole.run / name).read_bytes() == (found.run / name).read_bytes(), name


def test_what_was_removed_or_changed_is_made_again(done: Result, tmp_path: Path) -> None:
    before = done.exported.read_bytes()
    for path in (done.exported, *(done.run / "shrunk").glob("*.safetensors")):
        path.write_bytes(path.read_bytes()[:-1])
    (done.run / "metrics.json").unlink()
    again = compress(done.run, budget="0.5 macs")
    assert again.exported.read_bytes() == before
    assert again.metrics == done.metrics


def test_two_ways_to_the_same_widths_are_one_piece_of_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    solve = network_structure.compensate

    def spy(*arguments: Any, **options: Any) -> Network:
        done.append(arguments)
        return solve(*arguments, **options)

    monkeypatch.setattr(network_structure, "compensate", spy)
    monkeypatch.setattr(network_structure, "uniform", network_structure.spend)
    found = compress(tmp_path / "run", budget="0.5 macs", export="checkpoint")
    widths = {p.stem: p.read_text() for p in (tmp_path / "run" / "widths").glob("*.json")}
    rows = {row["plan"]: row for row in found.metrics["plans"]}
    assert len(rows) == len(widths) > len(set(widths.values())) == len(done)
    for one in rows:
        for two in rows:
            same = rows[one]["mean_kld"] == rows[two]["mean_kld"]
            assert same == (widths[one] == widths[two])


def test_batch_norms_are_as_a_held_out_part_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """96 images to calibrate on: enough to decide. Once the decision is turned round, the result
    is the other one, and what is told follows."""

    def told(name: str) -> tuple[Result, str]:
        other = images(40, seed=7)
        found = compress(tmp_path / name, data=X, test=other, budget="0.5 macs",
                         export="checkpoint")  # fmt: skip
        [line] = [note for note in found.metrics["notes"] if "batch norms" in note]
        return found, line

    first, line = told("first")
    again = "are re-estimated" in line
    assert again or "are as they were" in line
    monkeypatch.setattr(batchnorms, "_distance", lambda *_: next(turn))
    turn = iter([1.0, 2.0] * 3 if again else [2.0, 1.0] * 3)
    second, line = told("second")
    assert ("are re-estimated" in line) is not again
    a, b = (r.module.state_dict() for r in (first, second))
    assert not torch.equal(a["bn1.running_var"], b["bn1.running_var"])
    monkeypatch.undo()
    assert told("second")[1] == line, "told from the stored decision"
