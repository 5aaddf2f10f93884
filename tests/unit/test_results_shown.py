"""A result in a terminal of any width and in a notebook: the page's table, nothing lost."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lighten
from lighten import summary
from lighten.report import notebook
from lighten.report.facts import Facts, of_run
from lighten.report.glance import rows
from lighten.report.svg_curve import curve
from lighten.report.terminal import Glance, Records, plain
from lighten.types import Plan
from report_runs import HOSTILE, NETWORK_METRICS, TEXT_METRICS, make_run
from small_networks import images, trained

WORSE = {**NETWORK_METRICS["after"], "peak_memory_bytes": 400_000_000, "p50_ms": 9.0}
METRICS = {
    "text": TEXT_METRICS,
    "network": NETWORK_METRICS,
    "worse": {**NETWORK_METRICS, "after": WORSE},
    "student": {**NETWORK_METRICS, "teacher": NETWORK_METRICS["before"]},
}  # fmt: skip


def printed(thing: Any, width: int, colour: bool = False) -> str:
    screen = io.StringIO()
    console = Console(
        file=screen, width=width, force_terminal=True, highlight=False, legacy_windows=False,
        color_system="standard" if colour else None,
    )  # fmt: skip
    console.print(thing)
    return screen.getvalue()


def bare(text: str) -> str:
    """Without styles and blanks: what is left is what is said."""
    return re.sub(r"\x1b\[[\d;]*m|\s", "", text)


# -- the terminal --------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [20, 32, 40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("kind", list(METRICS))
def test_every_width_shows_everything(kind: str, width: int) -> None:
    text = printed(Glance(METRICS[kind]), width)
    lines = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()
    assert max(map(len, lines)) <= width
    said = bare(text)
    for row in rows(METRICS[kind]):
        for side in ("before", "after"):
            if row.text(side) != "–" and width >= 40:
                assert bare(plain(row.text(side))) in said, row.key
                assert bare(plain(row.interval(side))) in said, row.key
    for side in ("teacher", "student") if kind == "student" else ("before", "after"):
        assert side in said


def test_a_wide_one_is_a_table_and_a_narrow_one_is_not() -> None:
    wide, narrow = (printed(Glance(TEXT_METRICS, verdict=False), w) for w in (120, 32))
    assert len(wide.splitlines()) == 1 + len(rows(TEXT_METRICS))
    assert "98.4 MB" in wide.splitlines()[1]
    assert "40.0 MB" in wide.splitlines()[1]
    assert narrow.splitlines()[0].split() == ["file", "size"]
    assert narrow.splitlines()[1].split() == ["before", "98.4", "MB"]


def test_what_a_colour_says_a_word_says_too() -> None:
    plain_text, coloured = (printed(Glance(METRICS["worse"]), 120, c) for c in (False, True))
    assert bare(plain_text) == bare(coloured)
    for line in coloured.splitlines():
        assert ("\x1b[31m" in line) == ("worse" in line and "Please note" not in line), line
    assert "\x1b[31m" in coloured


def test_warnings_come_first_and_then_the_sentence() -> None:
    first, *rest = printed(Glance(METRICS["worse"]), 200).splitlines()
    assert "memory while running" in first or "time per example" in first
    assert any(line.startswith(("\x1b[1m1.81× smaller", "1.81× smaller"))
               for line in rest)  # fmt: skip


def test_summary_puts_the_table_first_and_loses_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary.show({"run": "runs/x", **TEXT_METRICS})
    out = capsys.readouterr().out
    assert out.index("file size") < out.index("runs/x") < out.index("plans")
    assert "note: calibrated on a short text" in out


@pytest.mark.parametrize("width", [30, 40, 60, 80])
def test_other_tables_become_lines_where_they_have_no_room(width: int) -> None:
    found = [{"plan": "allocated", "mean_kld": 0.0729, "a_long_name_of_a_column": "b" * 30},
             {"plan": "uniform", "mean_kld": 0.178, "a_long_name_of_a_column": ""}]  # fmt: skip
    text = printed(Records.of("plans", found), width)
    lines = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()
    assert max(map(len, lines)) <= width
    for word in ("allocated", "uniform", "0.0729", "0.178", "b" * 20):
        assert word in bare(text)


def test_markup_in_names_is_not_read() -> None:
    name = "[red]x[/red] [bold"
    assert bare(name) in bare(printed(Records.of("t", [{"axis": name}]), 80))
    metrics = {**TEXT_METRICS, "plans": [{"plan": name, "chosen": "yes", "mean_kld": 0.1},
                                         {"plan": "uniform", "mean_kld": 0.05}]}  # fmt: skip
    printed(Glance(metrics), 80)


# -- the notebook --------------------------------------------------------------------------------
class Checked(HTMLParser):
    """Elements are closed in order; what was seen."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.words = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def result(folder: Path, metrics: Mapping[str, Any]) -> lighten.Result:
    return lighten.Result(folder, folder / "exports" / "x", Plan({}, {}, {}), dict(metrics))


@pytest.mark.parametrize("kind", ["text", "network"])
def test_a_result_shows_its_table_and_its_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    run = make_run(tmp_path / "run", kind)
    html = result(run, METRICS[kind])._repr_html_()
    seen = Checked(html)
    assert seen.tags.count("svg") == 1
    assert seen.tags.count("tr") == 1 + len(rows(METRICS[kind]))
    for row in rows(METRICS[kind]):
        assert row.text("after") in seen.words
    assert "smaller" in seen.words
    assert "predicted" in seen.words
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert "文件" in Checked(result(run, METRICS[kind])._repr_html_()).words


def test_without_its_folder_a_result_still_shows_what_it_holds(tmp_path: Path) -> None:
    seen = Checked(result(tmp_path / "gone", TEXT_METRICS)._repr_html_())
    assert "table" in seen.tags
    assert "40.0\u00a0MB" in seen.words
    assert "40.0 MB" in printed(result(tmp_path / "gone", TEXT_METRICS), 80)


def test_names_are_shown_and_not_run(tmp_path: Path) -> None:
    points = [{"plan": HOSTILE, "source": "peer", "measured": True, "bytes": 1e6 * i,
               "mean_kld": 0.1 * i} for i in (1, 2)]  # fmt: skip
    metrics = {**TEXT_METRICS, "problems": [HOSTILE]}
    run = make_run(tmp_path / "run", metrics=metrics, shown={"curve": points})
    seen = Checked(notebook.of_facts(of_run(run), "en"))
    assert not {"script", "img"} & set(seen.tags)
    assert not any(name.startswith("on") for name in seen.attributes)
    assert HOSTILE in seen.words
    rowed = Checked(notebook.of_rows(HOSTILE, [{HOSTILE: HOSTILE}]))
    assert rowed.words == 3 * HOSTILE  # title, column, cell
    assert not {"script", "img"} & set(rowed.tags)


def test_the_curve_is_one_picture_with_all_points(tmp_path: Path) -> None:
    facts = of_run(make_run(tmp_path / "run"))
    picture = ElementTree.fromstring(curve(facts))
    assert picture.attrib["role"] == "img"
    assert "file size" in picture.attrib["aria-label"]
    marks = picture.findall("g")
    assert len(marks) == len(facts.rows("curve"))
    assert all(mark.findtext("title") for mark in marks)
    hollow = [m for m in marks if m[-1].attrib["fill"] == "none"]
    assert len(hollow) == sum(not p["measured"] for p in facts.rows("curve"))
    width, height = (float(n) for n in picture.attrib["viewBox"].split()[2:])
    for text in picture.iter("text"):
        assert 0 <= float(text.attrib["x"]) <= width
        assert 0 <= float(text.attrib["y"]) <= height


def test_one_point_is_no_curve() -> None:
    point = {"plan": "a", "source": "this plan", "bytes": 1.0, "mean_kld": 0.1}
    assert curve(Facts("x", "text", look={"curve": [point]})) == ""
    assert curve(Facts("x", "text")) == ""
    level = [{**point, "bytes": b} for b in (1.0, 2.0)]  # of one quality: still a curve
    ElementTree.fromstring(curve(Facts("x", "text", look={"curve": level})))


def test_a_pruned_network_shows_its_widths() -> None:
    x = images(24)
    pruned = lighten.prune(lighten.Network.of(trained(), x[:2]), budget="0.7 params", data=x)
    seen = Checked(pruned._repr_html_())
    assert f"{pruned.network.parameters:,} parameters" in seen.words
    text = printed(pruned, 80)
    for axis in pruned.couplings.axes:
        assert axis.name in seen.words
        assert bare(axis.name) in bare(text)
