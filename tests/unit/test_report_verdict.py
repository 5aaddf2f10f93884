"""How a report judges a run: the rows of its top table, and the verdict in a sentence."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lighten.report import page
from lighten.report.glance import row, rows
from lighten.report.verdict import sentence, verdict
from lighten.report.words import say
from report_runs import NETWORK_METRICS, TEXT_METRICS, changed, spread


# -- the top table ---------------------------------------------------------------------------------
def test_rows_say_what_became_better_and_by_how_much() -> None:
    found = {r.key: r for r in rows(NETWORK_METRICS)}
    assert say(found["bytes"].change or "", "en") == "1.81× smaller"
    assert say(found["macs"].change or "", "en") == "2.1× fewer"
    assert (found["p50_ms"].judged, found["p50_ms"].ratio) == ("better", 1.638 / 2.319)
    assert found["examples_per_second"].after == pytest.approx(1000 / 1.638)
    assert found["accuracy"].judged == "same", "its interval has zero in it"
    assert found["accuracy"].text("after") == "93.29\u00a0%"
    assert found["mean_kld"].judged == "", "there is nothing to compare it with"
    assert found["mean_kld"].before is None


@pytest.mark.parametrize(
    ("key", "after", "judged"),
    [
        ("bytes", 3_425_350, "same"),
        ("bytes", 4_000_000, "worse"),
        ("p50_ms", 2.319 * 1.04, "same"),
        ("p50_ms", 2.319 * 1.06, "worse"),
        ("peak_memory_bytes", 90_000_000, "worse"),
        ("accuracy_change", {"value": -0.02, "low": -0.03, "high": -0.01}, "worse"),
        ("accuracy_change", {"value": 0.02, "low": 0.01, "high": 0.03}, "better"),
    ],
)
def test_noise_is_no_change(key: str, after: Any, judged: str) -> None:
    found = row(changed(NETWORK_METRICS, "after", **{key: after}), key.removesuffix("_change"))
    assert found is not None
    assert found.judged == judged


def test_nothing_measured_gives_no_rows() -> None:
    assert rows({}) == []
    assert rows({"before": {"bytes": None}, "after": {"bytes": float("nan")}}) == []
    assert sentence(verdict({})) == ""


# -- the verdict -----------------------------------------------------------------------------------
def test_the_verdict_is_a_sentence() -> None:
    assert sentence(verdict(NETWORK_METRICS, "onnx")) == (
        "1.81× smaller, 2.1× fewer multiply\u2011adds, 1.42× faster in onnxruntime, "
        "accuracy −0.10 points (−0.30 … +0.10). "
        "Beats one setting for all layers by 1.30 points (93.29\u00a0% against 91.99\u00a0%)."
    )
    assert "perplexity +3.6 %" in sentence(verdict(TEXT_METRICS, "gguf"))
    assert "llama.cpp" in sentence(verdict(TEXT_METRICS, "gguf"), "zh")


def test_overlapping_intervals_are_told() -> None:
    metrics = deepcopy(TEXT_METRICS)
    metrics["plans"][1]["mean_kld"] = spread(0.08, 0.02)
    assert "though the intervals overlap" in sentence(verdict(metrics))


def test_where_accuracies_are_equal_what_is_finer_decides() -> None:
    metrics = deepcopy(NETWORK_METRICS)
    first, second = metrics["plans"]
    second |= {"accuracy": first["accuracy"], "mean_kld": spread(0.3, 0.01)}
    first["mean_kld"] = spread(0.2, 0.01)
    assert "mean KL divergence 0.200" in sentence(verdict(metrics))
    del first["mean_kld"]
    assert "As good as one setting for all layers" in sentence(verdict(metrics))


def test_what_did_not_change_is_no_headline() -> None:
    metrics = changed(NETWORK_METRICS, "after", macs=NETWORK_METRICS["before"]["macs"])
    told = [r.key for r in page.tiles(rows(metrics))]
    assert told == ["bytes", "p50_ms", "accuracy", "peak_memory_bytes"]
    assert "macs" in [r.key for r in page.tiles(rows(NETWORK_METRICS))]


def test_what_is_worse_than_plain_stands_first() -> None:
    metrics = deepcopy(TEXT_METRICS)
    metrics["plans"][0]["chosen"], metrics["plans"][1]["chosen"] = "", "yes"
    assert [w.key for w in verdict(metrics).warnings] == ["warning.plain"]
    metrics = deepcopy(TEXT_METRICS)
    metrics["plans"][1]["mean_kld"] = spread(0.05, 0.01)
    assert [w.key for w in verdict(metrics).warnings] == ["warning.worse_than_plain"]
    slow = changed(TEXT_METRICS, "after", generate_tokens_per_second=50.0)
    assert [w.key for w in verdict(slow).warnings] == ["warning.worse"]
    large = changed(TEXT_METRICS, "after", peak_memory_bytes=300e6)
    assert "196\u00a0MB" in say(verdict(large).warnings[0], "en")


@pytest.mark.parametrize(
    ("problem", "key"),
    [
        ("the output is larger than the input (3.00 MB, 2.00 MB)", "problem.larger"),
        ("the output is slower than the input (3 ms, 2 ms)", "problem.slower"),
        ("the budget is not met: bytes 300, allowed 200", "problem.budget"),
        ("something new", "problem.other"),
    ],
)
def test_problems_are_said_in_both_languages(problem: str, key: str) -> None:
    found = verdict({**NETWORK_METRICS, "problems": [problem]}).problems
    assert [p.key for p in found] == [key]
    assert all(value in say(found[0], "zh") for value in found[0].places.values())
