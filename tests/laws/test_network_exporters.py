"""What holds for every exporter of networks: sizes, read-back, equal bytes, all or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lighten.errors import UserError, WrongUse
from lighten.network import Network
from lighten.quantized import Quantized
from lighten.registry import exporters
from onnx_networks import Tokens, network, quantized

NAMES = tuple(name for name in exporters if exporters[name].holds == "networks")
KINDS = ("float", "int8", "int4")


@pytest.fixture(params=NAMES)
def exporter(request: pytest.FixtureRequest) -> Any:
    if request.param == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
    return exporters[request.param]


def subject(kind: str) -> Network | Quantized:
    net = network()
    return net if kind == "float" else quantized(net, f"{kind}_channel_sym")


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


@pytest.mark.parametrize("kind", KINDS)
def test_reads_back_and_has_the_announced_size(exporter: Any, kind: str, tmp_path: Path) -> None:
    given = subject(kind)
    out = tmp_path / f"out{exporter.suffix}"
    assert exporter.refuses(given) is None
    exporter.write(given, out)
    assert exporter.nbytes(given) == sum(map(len, content(out).values()))
    read = exporter.read(out)
    net = given if isinstance(given, Network) else given.network
    state = net.module.state_dict()
    assert set(read) == set(state)
    for name, value in state.items():
        assert read[name].shape == value.shape
        if isinstance(given, Quantized) and name in given.weights:
            want = given.weights[name].dense().reshape(value.shape)
            assert torch.equal(read[name], want), name
        elif kind == "float" or not name.endswith("bias"):
            assert torch.equal(read[name], value), name
        else:  # a bias may be rounded to int32 steps of input scale times weight scale
            assert torch.allclose(read[name], value, atol=2e-3), name


@pytest.mark.parametrize("kind", ["float", "int4"])
def test_two_writes_are_equal_and_tell_nothing_of_the_machine(
    exporter: Any, kind: str, tmp_path: Path
) -> None:
    a, b = (tmp_path / f"{letter}{exporter.suffix}" for letter in "ab")
    exporter.write(subject(kind), a)
    exporter.write(subject(kind), b)
    assert content(a) == content(b)
    assert sorted(tmp_path.iterdir()) == [a, b]
    here = str(Path(__file__).resolve().parents[2]).encode()
    assert not any(here in data or b"site-packages" in data for data in content(a).values())


def test_compressed_weights_are_smaller(exporter: Any) -> None:
    net = network(Tokens, (2, 7, 64))
    sizes = [exporter.nbytes(net)]
    sizes += [exporter.nbytes(quantized(net, f"int{b}_channel_sym")) for b in (8, 4)]
    weights = sum(layer.size for layer in net.layers)
    assert sizes[0] - sizes[1] > 2 * weights
    assert sizes[1] - sizes[2] > 0.3 * weights


def test_language_models_are_refused_with_a_way_out(exporter: Any, tmp_path: Path) -> None:
    why = exporter.refuses(object())
    assert why is not None
    assert "gguf" in why
    with pytest.raises(WrongUse):
        exporter.write(object(), tmp_path / f"out{exporter.suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [n for n in exporters if n not in NAMES])
def test_exporters_of_language_models_refuse_networks_with_a_way_out(name: str) -> None:
    for kind in ("float", "int8"):
        assert "onnx" in str(exporters[name].refuses(subject(kind)))


def test_other_peoples_places_are_refused(exporter: Any, tmp_path: Path) -> None:
    folder = tmp_path / f"home{exporter.suffix}"
    folder.mkdir()
    (folder / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError):
        exporter.write(subject("float"), folder)
    assert content(folder) == {"diary.txt": b"dear diary"}
    assert list(tmp_path.iterdir()) == [folder]


def test_what_is_no_such_file_is_bad_input(exporter: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        exporter.read(tmp_path / f"nothing{exporter.suffix}")
    place = tmp_path / f"noise{exporter.suffix}"
    place.write_bytes(b"\x08\x0a\xff\xff\xff no model")
    with pytest.raises(UserError):
        exporter.read(place)
