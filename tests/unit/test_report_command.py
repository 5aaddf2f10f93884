"""`lighten report`: what it prints, writes, opens and refuses."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lighten.cli import main
from report_runs import TEXT_METRICS, make_run


def test_report_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "mean kld" in out
    assert str(folder / "report.html") in err.replace("\n", "")
    other = tmp_path / "pages" / "x.html"
    assert main(["report", str(folder), "--html", str(other), "--lang", "zh", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"] == "allocated"
    assert '<html lang="zh">' in other.read_text(encoding="utf-8")


def test_report_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("small", "smaller", "smallest")
    folders = [str(make_run(tmp_path / name, "network")) for name in names]
    assert main(["report", *folders]) == 0
    out, _ = capsys.readouterr()
    assert all(name in out for name in names)
    assert (tmp_path / "comparison.html").is_file()


def test_report_opens_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    folder = make_run(tmp_path / "run")
    assert main(["report", str(folder), "--open", "--json"]) == 0
    assert opened == [(folder / "report.html").as_uri()]


def test_report_of_a_failed_run_fails(tmp_path: Path) -> None:
    metrics = {**TEXT_METRICS, "problems": ["the output is larger than the input (2 MB, 1 MB)"]}
    assert main(["report", str(make_run(tmp_path / "run", metrics=metrics))]) == 1


def test_wrong_use_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report", str(make_run(tmp_path / "run")), "--lang", "xx"]) == 2
    assert "known: en, zh" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_that_cannot_be_written_to_is_still_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    folder.chmod(0o500)
    try:
        assert main(["report", str(folder)]) == 0
    finally:
        folder.chmod(0o700)


def test_a_place_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "x.html"
    assert main(["report", str(make_run(tmp_path / "run")), "--html", str(target)]) == 2
