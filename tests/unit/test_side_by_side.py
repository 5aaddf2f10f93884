"""Before and after in one table."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from lighten.summary import render


def rows(columns: dict[str, dict[str, Any]]) -> list[list[str]]:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(render(columns))
    return [line.split("  ") for line in console.export_text().splitlines()]


def cells(columns: dict[str, dict[str, Any]]) -> list[list[str]]:
    return [[cell.strip() for cell in row if cell.strip()] for row in rows(columns)]


def test_two_columns_get_a_ratio_of_values() -> None:
    perplexity = {"value": 30.0, "low": 27.0, "high": 33.0}
    before = {"bytes": 100_000_000, "perplexity": 20.0, "format": "q4_1"}
    after = {
        "bytes": 80_000_000,
        "perplexity": perplexity,
        "format": "mixed",
        "mean_kld": 0.1,
    }
    assert cells({"before": before, "after": after}) == [
        ["before", "after", "ratio"],
        ["bytes", "100.00 MB", "80.00 MB", "0.8x"],
        ["perplexity", "20", "30 (27 to 33)", "1.5x"],
        ["format", "q4_1", "mixed"],
        ["mean kld", "0.1"],
    ]


def test_one_or_three_columns_get_none() -> None:
    assert cells({"measured": {"bytes": 2_000_000}}) == [["measured"], ["bytes", "2.00 MB"]]
    three = {name: {"tokens": 3} for name in "abc"}
    assert cells(three) == [["a", "b", "c"], ["tokens", "3", "3", "3"]]


def test_nothing_is_divided_by_zero_or_by_what_is_missing() -> None:
    found = cells({"before": {"seconds": 0, "rate": None}, "after": {"seconds": 1, "rate": 2.0}})
    assert found[1:] == [["seconds", "0.0 s", "1.0 s"], ["rate", "-", "2"]]
