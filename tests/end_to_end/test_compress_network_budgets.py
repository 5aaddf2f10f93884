"""compress() of networks within budgets: multiply-adds, parameters, bytes, milliseconds."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compressed_networks import EXAMPLE, X, Y, compress, held_out, idle, made_up, size
from lighten import network_cost
from lighten.macs import macs
from lighten.network import Network
from lighten.pipeline import Result
from lighten.registry import exporters
from lighten.runtimes import onnxruntime
from lighten.samples import samples
from small_networks import Residual, trained

pytestmark = pytest.mark.usefixtures("steady")


def test_half_of_the_multiply_adds(done: Result) -> None:
    small = Network.of(done.module, EXAMPLE)
    before, after = done.metrics["before"], done.metrics["after"]
    assert macs(small).total == after["macs"] <= 0.5 * before["macs"]
    assert before["macs"] == macs(Network.of(trained(), EXAMPLE)).total
    assert size(done.exported) == after["bytes"] < before["bytes"]
    assert isinstance(done.module, Residual)
    x = held_out()
    [found] = onnxruntime.run(done.exported, x)
    with torch.no_grad():
        torch.testing.assert_close(found, done.module(x), rtol=1e-4, atol=1e-5)
    [single] = onnxruntime.run(done.exported, x[:1])
    torch.testing.assert_close(single, found[:1], rtol=1e-4, atol=1e-5)


def test_the_facts_of_a_run(done: Result) -> None:
    stored = json.loads((done.run / "metrics.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(done.metrics))
    assert {"before", "after", "plans", "notes", "problems", "widths"} <= set(stored)
    assert stored["problems"] == []
    plans = {row["plan"]: row for row in stored["plans"]}
    assert {"allocated", "uniform"} <= set(plans)
    best = min(plans, key=lambda name: plans[name]["mean_kld"]["value"])
    assert [name for name, row in plans.items() if row["chosen"]] == [best] == [stored["plan"]]
    assert plans[best]["mean_kld"]["value"] == pytest.approx(stored["after"]["mean_kld"]["value"])
    assert stored["examples"] == len(held_out())
    assert stored["calibrated_on"] == len(samples((X, Y)).calibration)
    for row in (stored["before"], stored["after"]):
        assert 0 <= row["accuracy"]["low"] <= row["accuracy"]["value"] <= 1
        assert row["p50_ms"] > 0
    plan = json.loads((done.run / "plan.json").read_text(encoding="utf-8"))
    assert plan["widths"] == {w["axis"]: w["units"] for w in stored["widths"]}


def test_half_of_the_parameters(tmp_path: Path) -> None:
    found = compress(tmp_path / "run", budget="0.5 params", data=X)
    whole = sum(p.numel() for p in trained().parameters())
    assert sum(p.numel() for p in found.module.parameters()) <= 0.5 * whole
    assert "accuracy" not in found.metrics["after"], "there are no labels"
    assert found.metrics["after"]["top1_agreement"]["value"] <= 1
    assert not found.metrics["problems"]


@pytest.mark.parametrize("quantize", ["auto", "none"])
def test_a_size_of_the_file(tmp_path: Path, quantize: str) -> None:
    whole = tmp_path / "whole.onnx"
    exporters["onnx"].write(Network.of(trained(), EXAMPLE), whole)
    room = int({"auto": 0.55, "none": 0.7}[quantize] * size(whole))
    found = compress(tmp_path / "run", budget=f"{room / 1000}kB", quantize=quantize)
    assert size(found.exported) <= room
    assert found.metrics["after"]["bytes"] == size(found.exported)
    assert not found.metrics["problems"]


def test_a_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compress(tmp_path / "run", budget="70% ms", data=X)
    before, after = found.metrics["before"]["p50_ms"], found.metrics["after"]["p50_ms"]
    assert after == made_up(found.exported).p50 <= 0.7 * before
    assert all(row["units"] % 8 == 0 for row in found.metrics["widths"])
    assert not found.metrics["problems"]
    idle(monkeypatch)  # a time that is taken again could be on the other side of the budget
    assert compress(tmp_path / "run", budget="70% ms", data=X).metrics == found.metrics


def test_a_budget_that_is_missed_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last word has the file that was written, not those on the way to it."""
    speeds = network_cost.speeds

    def slower(export: str, files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
        found = speeds(export, files)
        for name, path in files.items():
            found[name]["p50_ms"] += 200 * ("exports" in str(path))
        return found

    monkeypatch.setattr(network_cost, "speeds", slower)
    found = compress(tmp_path / "run", budget="100ms", data=X)
    assert "budget is not met" in " ".join(found.metrics["problems"])


@pytest.mark.parametrize(
    "quantize",
    [
        pytest.param("auto", marks=pytest.mark.slow),
        pytest.param("int8", marks=pytest.mark.slow),
        "none",
    ],
)
def test_a_share_is_of_the_same_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str
) -> None:
    """The machine was busy when the original was measured: that makes no share easier to meet."""
    load = iter([5.0])

    def busy(files: Mapping[str, Path], **_: Any) -> dict[str, onnxruntime.Latency]:
        share = next(load, 1.0)
        return {
            name: onnxruntime.Latency(share * made_up(path).p50, 99, 99, 9, 10**8)
            for name, path in files.items()
        }

    monkeypatch.setattr(onnxruntime, "latencies", busy)
    found = compress(tmp_path / "run", budget="70% ms", data=X, quantize=quantize)
    [original] = (found.run / "original").glob("*.onnx")
    assert made_up(found.exported).p50 <= 0.7 * made_up(original).p50
    assert found.metrics["before"]["p50_ms"] == made_up(original).p50
    assert not found.metrics["problems"]


def test_the_real_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(network_cost, "SECONDS", 0.05)
    monkeypatch.setattr(network_cost, "SECONDS_A_TRY", 0.05)
    found = compress(tmp_path / "run", budget="10000ms", data=X)
    after = found.metrics["after"]
    assert 0 < after["p50_ms"] <= after["p90_ms"] <= after["p99_ms"]
    assert after["peak_memory_bytes"] > 10**6
    assert found.metrics["plans"] == []
