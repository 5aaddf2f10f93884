"""ONNX files in the runtimes that they are for, and how these are timed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lighten.errors import BadInput, BadOutput, MissingPackage, WrongUse
from lighten.registry import exporters
from lighten.runtimes import onnxruntime, openvino
from onnx_networks import Tokens, network, quantized, values

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    net = network()
    subjects = {"float": net, "int8": quantized(net), "int4": quantized(net, "int4_channel_sym")}
    for name, subject in subjects.items():
        exporters["onnx"].write(subject, folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in subjects}


def test_onnx_itself_finds_no_fault(files: dict[str, Path]) -> None:
    import onnx

    for path in files.values():
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert model.producer_name == "lighten"
        assert not any(n.doc_string or n.metadata_props for n in model.graph.node)


def test_check_says_what_goes_in_and_out(files: dict[str, Path]) -> None:
    found = onnxruntime.check(files["int8"])
    assert found == {"inputs": {"x": ["batch", 3, 20, 20]}, "outputs": {"output": [1, 10]}}


@pytest.mark.skipif(not openvino.available(), reason="openvino is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openvino_computes_the_same(files: dict[str, Path], tmp_path: Path) -> None:
    net = network()
    x = torch.randn(5, 3, 20, 20)
    assert torch.allclose(openvino.run(files["float"], x)[0], net(x), atol=1e-5)
    for name in ("int8", "int4"):
        q = quantized(net, f"{name}_channel_sym")
        scale = list(q.edges.values())[-1].scale
        apart = (openvino.run(files[name], x)[0] - values(net, x, q)["output"]).abs() / scale
        assert apart.max() < 1.01
    tokens = network(Tokens, (2, 7, 64))
    q = quantized(tokens, "int4_g32", without=values(tokens, tokens.inputs[0]))
    exporters["onnx"].write(q, tmp_path / "tokens.onnx")
    x = torch.randn(3, 7, 64)
    found = openvino.run(tmp_path / "tokens.onnx", x)[0]
    assert torch.allclose(found, values(tokens, x, q)["output"], atol=1e-5)


def test_latencies_in_turns_and_memory(files: dict[str, Path]) -> None:
    found = onnxruntime.latencies(files, seconds=0.05)
    assert set(found) == set(files)
    for one in found.values():
        assert 0 < one.p50 <= one.p90 <= one.p99
        assert one.runs >= 16
        assert 10e6 < one.peak_rss_bytes < 1e9
    assert onnxruntime.latency(files["int8"], seconds=0.05, batch=3).p50 > 0


def test_profile_times_every_node(files: dict[str, Path]) -> None:
    found = onnxruntime.profile(files["float"], seconds=0.05)
    assert len(found) == sum(onnxruntime.operators(files["float"]).values())
    assert all(t >= 0 for t in found.values())


def test_other_files_and_uses_are_user_errors(files: dict[str, Path], tmp_path: Path) -> None:
    noise = tmp_path / "noise.onnx"
    noise.write_bytes(files["int8"].read_bytes()[:500])
    calls = [
        onnxruntime.check, onnxruntime.latency, onnxruntime.profile, onnxruntime.operators,
        onnxruntime.Session,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(BadOutput):
            call(noise)
        with pytest.raises(BadInput):
            call(tmp_path / "nothing.onnx")
    with pytest.raises(WrongUse, match="2 were given"):
        onnxruntime.run(files["int8"], (torch.zeros(1), torch.zeros(1)))
    with pytest.raises(BadOutput):
        onnxruntime.run(files["int8"], torch.zeros(1, 3, 20, 20, dtype=torch.float64))
    with pytest.raises(WrongUse):
        onnxruntime.latency(files["int8"], seconds=0)
    with pytest.raises(WrongUse):
        onnxruntime.latencies({})
    with pytest.raises(BadInput):
        openvino_or_skip().run(tmp_path / "nothing.onnx", torch.zeros(1))


def openvino_or_skip() -> object:
    if not openvino.available():
        pytest.skip("openvino is not installed")
    return openvino


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, files: dict[str, Path]) -> None:
    monkeypatch.setattr(onnxruntime, "available", lambda: False)
    for call in (onnxruntime.check, onnxruntime.latency, onnxruntime.operators):
        with pytest.raises(MissingPackage, match="onnxruntime"):
            call(files["int8"])
