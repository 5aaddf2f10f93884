"""What a report reads from a run, whole, unfinished or damaged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lighten.errors import WrongUse
from lighten.report import page
from lighten.report.facts import of_run
from report_runs import KINDS, make_run, rewrite


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_is_read_whole(tmp_path: Path, kind: str) -> None:
    facts = of_run(make_run(tmp_path / "run", kind, history=True))
    assert (facts.kind, facts.finished, facts.name) == (kind, True, "run")
    assert set(facts.look) == {"layers", "axes", "curve", "differences", "provenance"}
    assert len(facts.histories[0].rows) == 20
    assert facts.stages[0]["stage"] == "candidates"
    assert not facts.notes


def test_an_older_run_has_its_layers_from_the_plan(tmp_path: Path) -> None:
    facts = of_run(make_run(tmp_path / "run", shown={}))
    assert [layer["name"] for layer in facts.rows("layers")] == ["a.2.weight", "a.10.weight"]
    kept, done = facts.rows("layers")
    assert (kept["bytes_before"], kept["bytes_after"]) == (1000.0, 1000.0)
    assert (done["format"], done["bytes_after"], done["sensitivity"]) == ("q4_k", 300.0, 0.01)


def test_a_killed_run_has_what_is_there(tmp_path: Path) -> None:
    facts = of_run(make_run(tmp_path / "run", finished=False, shown={}))
    assert not facts.finished
    assert facts.metrics == {}
    assert facts.rows("layers")


@pytest.mark.parametrize("damage", ["", "{", "null", "[1, 2]", "7"])
@pytest.mark.parametrize("name", ["layers", "axes", "curve", "differences", "provenance"])
def test_what_is_damaged_is_left_out_and_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = make_run(tmp_path / "run")
    rewrite(folder, f"look/{name}.json", damage)
    facts = of_run(folder)
    if damage != "[1, 2]" or name in ("differences", "provenance"):
        assert [note.places["file"] for note in facts.notes] == [f"look/{name}.json"]
    assert "<html" in page.render(facts, "en")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="not a run"):
        of_run(tmp_path)
