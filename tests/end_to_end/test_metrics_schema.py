"""docs/reference/metrics-schema.md names every key that a real run writes, and runs write them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lighten
from lighten import pipeline
from lighten.runtimes import llama_cpp

FREE = {"versions"}
"""Objects whose keys are names of things."""

INTERVAL = {"value", "low", "high"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (f"Line {i}: the quick fox sees {i * i} birds." for i in range(200))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def done(
    tiny: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> pipeline.Result:
    out = tmp_path_factory.mktemp("done") / "run"
    speed = llama_cpp.Speed(1.0, 2.0, 3.0, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "available", lambda: True)
        patch.setattr(llama_cpp, "check", lambda path: None)
        patch.setattr(llama_cpp, "speed", lambda path, **_: speed)
        patch.setattr(llama_cpp, "complete", lambda path, prompt, **_: f"and {path.name}")
        return lighten.compress(
            tiny("llama"), budget="60%", data=text, out=out, samples=8, length=64
        )


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Result:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from lighten.runtimes import onnxruntime
    from small_networks import images, labels, trained

    steady = onnxruntime.Latency(0.1, 0.2, 0.3, 9, 10**8)
    x = images(96)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "latency", lambda *_, **__: steady)
        patch.setattr(onnxruntime, "latencies", lambda files, **_: dict.fromkeys(files, steady))
        return lighten.compress(
            trained(), x[:1], budget="0.6 macs", quantize="int8", data=(x, labels(trained(), x)),
            out=tmp_path_factory.mktemp("network") / "run",
        )  # fmt: skip


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("lightning", "optuna"):
        pytest.importorskip(package)
    from small_networks import images, labels, trained

    x, out = images(96), tmp_path_factory.mktemp("student") / "run"
    lighten.distill(
        trained(), "half width", (x, labels(trained(), x)), learn_from="logits:1,labels:0.5",
        length="4steps", tune=2, batch=16, augment="none", out=out,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def schema(repo_root: Path) -> dict[str, set[str]]:
    """File -> the words that its section of the page sets in code; metrics.json: all before."""
    page = (repo_root / "docs" / "reference" / "metrics-schema.md").read_text(encoding="utf-8")
    metrics, *rest = re.split(r"^### `(look/\w+\.json)`$", page, flags=re.MULTILINE)
    found = {"metrics.json": _words(metrics)}
    for name, section in zip(rest[::2], rest[1::2], strict=True):
        found[name] = _words(section) | found["metrics.json"]
    return found


def _words(text: str) -> set[str]:
    return {word for code in re.findall(r"`([^`]+)`", text) for word in re.split(r"\W+", code)}


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and not value.keys() >= INTERVAL:
        for key, inner in value.items():
            yield key
            if key not in FREE:
                yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)


def _read(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text(encoding="utf-8"))


TEXT = ("layers", "curve", "differences", "provenance")


@pytest.mark.parametrize("name", ["metrics.json", *(f"look/{name}.json" for name in TEXT)])
def test_every_key_of_a_run_on_a_language_model_is_in_the_page(
    done: pipeline.Result, schema: dict[str, set[str]], name: str
) -> None:
    assert set(_keys(_read(done.run, name))) <= schema[name]


@pytest.mark.parametrize("name", ["metrics.json", *(f"look/{n}.json" for n in (*TEXT, "axes"))])
def test_every_key_of_a_run_on_a_network_is_in_the_page(
    network: pipeline.Result, schema: dict[str, set[str]], name: str
) -> None:
    assert set(_keys(_read(network.run, name))) <= schema[name]


@pytest.mark.parametrize("name", ["metrics.json", "look/provenance.json"])
def test_every_key_of_a_distillation_is_in_the_page(
    student: Path, schema: dict[str, set[str]], name: str
) -> None:
    assert set(_keys(_read(student, name))) <= schema[name]
    assert "learn_from='logits:1,labels:0.5'" in _read(student, "look/provenance.json")["command"]


def test_every_file_of_a_run_on_networks_is_in_the_other_page(
    network: pipeline.Result, student: Path, undocumented: Callable[[Path], set[str]]
) -> None:
    assert not undocumented(network.run)
    assert not undocumented(student)


def test_layers_are_those_of_the_file(done: pipeline.Result) -> None:
    rows = {row["name"]: row for row in _read(done.run, "look/layers.json")}
    model = lighten.open_model(done.exported)
    assert rows.keys() == set(done.plan.specs)
    for name, row in rows.items():
        tensor = model.tensors[name]
        spec = lighten.Spec.parse(done.plan.specs[name])
        assert row["format"] == (spec.format or "keep")
        assert tensor.nbytes <= row["bytes_after"] < tensor.nbytes + 32  # aligned in the file
        assert row["bits"] == pytest.approx(8 * row["bytes_after"] / row["parameters_after"])
        for side in ("before", "after") if spec.format else ("before",):
            counts = row["histogram"][side]
            assert len(counts) == 32
            assert sum(counts) == row["rows_seen"] * row["shape"][1]
        if spec.format is not None:
            assert 0 < row["error"] < 1
            assert row["sensitivity"] > 0
    predicted = sum(row["sensitivity"] or 0.0 for row in rows.values())
    assert predicted == pytest.approx(done.plan.predicted["nats"])


def test_the_curve_has_this_plan_and_others(done: pipeline.Result) -> None:
    points = _read(done.run, "look/curve.json")
    assert {p["source"] for p in points} >= {"original", "this plan", "other budget"}
    [mine] = [p for p in points if p["source"] == "this plan"]
    assert mine["bytes"] == done.metrics["after"]["bytes"]
    assert mine["mean_kld"] == done.metrics["after"]["mean_kld"]
    others = [p for p in points if p["source"] == "other budget" and not p["measured"]]
    assert len(others) >= 6
    lost = [p["mean_kld"] for p in sorted(others, key=lambda p: p["bytes"])]
    assert lost == sorted(lost, reverse=True)


def test_passages_are_as_far_off_as_was_measured(done: pipeline.Result) -> None:
    found = _read(done.run, "look/differences.json")
    assert found["kind"] == "text"
    windows = found["windows"]
    means = [w["mean_kld"] for w in windows]
    assert means == sorted(means, reverse=True)
    if len(windows) == done.metrics["windows"]:
        mean = sum(means) / len(means)
        assert mean == pytest.approx(done.metrics["after"]["mean_kld"]["value"], rel=1e-4)
    for window in windows:
        assert len(window["tokens"]) == len(window["kld"])
    said = "".join(windows[0]["tokens"])
    assert "fox" in said
    assert found["continuation"]["after"] == f"and {done.exported.name}"
    assert found["continuation"]["before"] != found["continuation"]["after"]


def test_provenance_tells_how_it_was_made(done: pipeline.Result) -> None:
    told = _read(done.run, "look/provenance.json")
    assert "--budget 60%" in told["command"]
    assert told["model"]["digest"] == _read(done.run, "request.json")["model"]
    assert told["data"]["digest"] == _read(done.run, "request.json")["data"]


def test_what_was_looked_at_is_not_looked_at_again(
    done: pipeline.Result, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lighten.look import language

    for name in ("layers", "curve", "passages", "continuation", "provenance"):
        monkeypatch.setattr(language, name, None)
    before = {p.name: p.read_bytes() for p in (done.run / "look").iterdir()}
    source = _read(done.run, "request.json")["source"]
    lighten.compress(source, budget="60%", data=text, out=done.run, samples=8, length=64)
    assert {p.name: p.read_bytes() for p in (done.run / "look").iterdir()} == before
