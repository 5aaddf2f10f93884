"""Formats of layers and widths of axes from one budget: the plan, the file, resuming, refusals."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from lighten import errors, front, job, network_cost, network_mixed, network_structure
from lighten.latency_operators import Operator
from lighten.mixture import quantize_mixed
from lighten.network import Network
from lighten.pipeline import Result
from lighten.registry import exporters
from lighten.runtimes import onnxruntime
from lighten.samples import samples
from lighten.types import Plan, Spec
from small_networks import images, labels, trained

X = images(96)
Y = labels(trained(), X)
NAMES = {"stem.weight", "conv1.weight", "conv2.weight", "head.weight"}


def made_up(path: Path, **_: Any) -> onnxruntime.Latency:
    """Milliseconds by the operators of a file: float convolutions and conversions are dear."""
    import onnx

    graph = onnx.load(path).graph
    kinds = [node.op_type for node in graph.node]
    codes = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    sizes = {t.name: math.prod(t.dims) for t in graph.initializer}
    kernels = [n.input[1] for n in graph.node if n.op_type in ("Conv", "Gemm")]
    ms = 0.05 * kinds.count("QuantizeLinear")
    ms += sum(1.0 if name in codes else 2 + sizes.get(name, 0) / 1e4 for name in kernels)
    return onnxruntime.Latency(ms, 2 * ms, 3 * ms, 9, 10**8)


def in_turns(files: Mapping[str, Path], **_: Any) -> dict[str, onnxruntime.Latency]:
    return {name: made_up(path) for name, path in files.items()}


class Table:
    def __init__(self, path: Path, threads: int, int8: bool) -> None:
        self.factor = 1.0 if int8 else 2.5

    def measure(self, operators: Iterable[Operator]) -> None:
        pass

    def milliseconds(self, operator: Operator) -> float:
        return 0.01 if operator.kind == "stream" else self.factor


@pytest.fixture(autouse=True)
def _steady(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "latency", made_up)
    monkeypatch.setattr(onnxruntime, "latencies", in_turns)
    monkeypatch.setattr(network_cost, "LatencyTable", Table)


def compress(out: Path, **options: Any) -> Result:
    return front.compress(
        trained(), X[:2], data=(X, Y), out=out, **{"quantize": "mixed", **options}
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Bytes between those of all layers in 8 bits and all in 4."""
    folder = tmp_path_factory.mktemp("mixed")
    net = Network.of(trained(), X[:2])
    sizes = {}
    for bits in (8, 4):
        specs = dict.fromkeys(NAMES, Spec.parse(f"int{bits}_channel_sym+a8@gptq"))
        path = folder / f"{bits}.onnx"
        exporters["onnx"].write(quantize_mixed(net, X, specs), path)
        sizes[bits] = path.stat().st_size
    assert sizes[4] < sizes[8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "latency", made_up)
        patch.setattr(onnxruntime, "latencies", in_turns)
        return compress(folder / "run", budget=f"{sum(sizes.values()) / 2000:.3f}kB")


def score(row: dict[str, Any]) -> float:
    return float(row["mean_kld"]["value"])


def test_a_budget_between_two_precisions_gives_a_mix(done: Result) -> None:
    room = float(json.loads((done.run / "request.json").read_text())["budget"][:-2]) * 1000
    assert done.exported.stat().st_size == done.metrics["after"]["bytes"] <= room
    assert not done.metrics["problems"]
    assert set(done.plan.specs) == NAMES
    assert len(set(done.plan.specs.values())) > 1
    told = {row["format"]: row["layers"] for row in done.metrics["formats"]}
    assert told == {t: list(done.plan.specs.values()).count(t) for t in done.plan.specs.values()}
    rows = {row["plan"]: row for row in done.metrics["plans"]}
    assert {"int8", "w4a8"} <= set(rows), "the plain ways stand beside it"
    assert done.metrics["plan"].startswith("mixed")
    assert score(rows[done.metrics["plan"]]) == min(map(score, rows.values()))
    assert score(done.metrics["after"]) == pytest.approx(score(rows[done.metrics["plan"]]))


def test_the_file_computes_what_the_plan_says(done: Result) -> None:
    x = samples((X, Y)).held_out
    [found] = onnxruntime.run(done.exported, x)
    with torch.no_grad():
        same = (found.argmax(1) == trained()(x).argmax(1)).float().mean()
    assert abs(float(same) - done.metrics["after"]["top1_agreement"]["value"]) <= 2 / len(x)
    plan = Plan.from_json((done.run / "plan.json").read_text(encoding="utf-8"))
    assert plan == done.plan
    import onnx

    tensors = {t.name: t for t in onnx.load(done.exported).graph.initializer}
    for name, text in plan.specs.items():
        spec = Spec.parse(text)
        codes = tensors.get(f"{name}/codes")
        if spec.format is None:
            assert codes is None
            assert tensors[name].data_type == onnx.TensorProto.FLOAT
        else:
            assert codes is not None
            four = codes.data_type == onnx.TensorProto.INT4
            assert four == spec.format.startswith("int4")


def test_an_edited_plan_is_made_as_it_says(done: Result, tmp_path: Path) -> None:
    plan = Plan.from_json((done.run / "plan.json").read_text(encoding="utf-8"))
    specs = {n: Spec.parse(t) for n, t in plan.specs.items()}
    specs["head.weight"] = Spec.parse("int4_channel_sym+a8@gptq")
    net = Network.of(done.module, X[:2])
    made = quantize_mixed(net, samples((X, Y)).calibration, specs)
    exporters["onnx"].write(made, tmp_path / "edited.onnx")
    assert made.weights["head.weight"].format.name == "int4_channel_sym"
    [found] = onnxruntime.run(tmp_path / "edited.onnx", X)
    assert found.shape == (96, 5)


def _work(*_: Any, **__: Any) -> Any:
    raise AssertionError("what is stored is not done again")


def test_the_same_call_again_does_nothing(done: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, names in {
        network_mixed: ("format_errors", "meet", "quantize_mixed"),
        network_structure: ("curves", "narrow", "compensate"),
        job: ("all_outputs",),
        network_cost: ("speeds", "nbytes"),
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, _work)
    budget = json.loads((done.run / "request.json").read_text())["budget"]
    again = compress(done.run, budget=budget)
    assert again.metrics == done.metrics
    assert again.plan == done.plan


@pytest.mark.slow  # test_compress_network_resumed.py stops single formats
def test_stopped_it_goes_on_with_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    options = {"budget": "25%", "export": "checkpoint"}
    with monkeypatch.context() as patch:
        patch.setattr(network_mixed, "meet", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(tmp_path / "run", **options)
    stored = json.loads((tmp_path / "run" / "format_errors.json").read_text())
    assert set(stored["weights"]) == NAMES
    monkeypatch.setattr(network_mixed, "format_errors", _work)
    monkeypatch.setattr(network_structure, "curves", _work)
    found = compress(tmp_path / "run", **options)
    assert found.metrics["after"]["bytes"] <= 0.25 * found.metrics["before"]["bytes"]


def test_a_checkpoint_holds_weights_alone(tmp_path: Path) -> None:
    found = compress(tmp_path / "run", budget="22%", export="checkpoint")
    assert found.metrics["after"]["bytes"] <= 0.22 * found.metrics["before"]["bytes"]
    assert all("+a" not in text for text in found.plan.specs.values())
    stored = exporters["checkpoint"].open(found.exported)
    assert not stored.edges
    for name, text in found.plan.specs.items():
        spec = Spec.parse(text)
        assert (name in stored.weights) == (spec.format is not None)
        assert spec.format is None or stored.weights[name].spec.format == spec.format


def test_room_in_time_is_spent_on_float_layers(tmp_path: Path) -> None:
    """All in integers takes less than asked: some layers may stay float."""
    found = compress(tmp_path / "run", budget="80% ms", quantize="auto")
    before, after = found.metrics["before"]["p50_ms"], found.metrics["after"]["p50_ms"]
    rows = {row["plan"]: row for row in found.metrics["plans"]}
    assert score(rows[found.metrics["plan"]]) == min(map(score, rows.values()))
    assert "int8" in rows
    assert len(rows) > 1
    assert after <= 0.8 * before
    assert not any(text.startswith("int4") for text in found.plan.specs.values())
    assert "keep" in found.plan.specs.values()


def test_more_than_the_original_is_in_8_bits(tmp_path: Path) -> None:
    found = compress(tmp_path / "run", budget="10MB", export="checkpoint")
    assert set(found.plan.specs.values()) == {"int8_channel_sym@gptq"}
    assert found.metrics["plans"] == []


@pytest.mark.parametrize("budget", ["0.5 macs", None])
def test_a_mix_needs_a_budget_that_formats_count_in(tmp_path: Path, budget: str | None) -> None:
    with pytest.raises(errors.WrongUse, match="mixed"):
        compress(tmp_path / "run", budget=budget)


def test_less_than_any_way_can_reach(tmp_path: Path) -> None:
    with pytest.raises(errors.ImpossibleBudget, match="budget in"):
        compress(tmp_path / "run", budget="1kB", export="checkpoint")
