"""Shapes of operators, and their times: measured once, kept in a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lighten.errors import BadInput, WrongUse
from lighten.latency_operators import Operator, operators
from lighten.latency_table import LatencyTable
from lighten.network import Network
from lighten.runtimes import onnxruntime
from onnx_networks import Residual, Tokens, network

needs_onnx = pytest.mark.skipif(not onnxruntime.available(), reason="onnxruntime is not installed")


def test_operators_of_a_network_read_as_text() -> None:
    found = {name: str(one) for name, one in operators(network(Residual)).items()}
    assert found["conv2d"] == "conv 3->16 k3x3 s2x2 p1x1 @20x20 clip"
    assert found["conv2d_1"] == "conv 16->16 g16 k3x3 s1x1 p1x1 @10x10 clip"
    assert found["conv2d_2"] == "conv 16->16 k1x1 s1x1 p0x0 @10x10"
    assert found["linear"] == "linear 24->10 @1"
    assert found["add"] == f"stream {3 * 16 * 100}"
    assert set(found) == {
        "conv2d", "conv2d_1", "conv2d_2", "conv2d_3", "linear", "add", "cat", "max_pool2d",
        "adaptive_avg_pool2d",
    }  # fmt: skip
    assert str(operators(network(Tokens, (2, 7, 64)))["linear"]) == "linear 64->128 @7 clip"


def test_one_dimension_and_named_padding() -> None:
    net = Network.of(nn.Conv1d(4, 6, 5, padding="same", dilation=2), torch.zeros(3, 4, 30))
    assert str(operators(net)["conv1d"]) == "conv 4->6 k5 s1 p4 d2 @30"


def test_other_widths() -> None:
    ops = operators(network(Residual))
    assert str(ops["conv2d"].at(3, 8)) == "conv 3->8 k3x3 s2x2 p1x1 @20x20 clip"
    assert str(ops["conv2d_1"].at(8, 8)) == "conv 8->8 g8 k3x3 s1x1 p1x1 @10x10 clip"
    assert ops["add"].at(8, 8).elements == ops["add"].elements // 2
    grouped = Operator("conv", 8, 8, 2, (1, 1), (1, 1), (0, 0), (1, 1), (4, 4))
    with pytest.raises(WrongUse, match="7 inputs"):
        grouped.at(7, 8)


@needs_onnx
@pytest.mark.parametrize("int8", [False, True])
def test_times_are_kept_and_larger_shapes_take_longer(tmp_path: Path, int8: bool) -> None:
    pytest.importorskip("onnx")
    path = tmp_path / "deep" / "table.json"
    table = LatencyTable(path, int8=int8)
    ops = operators(network(Residual))
    total = table.total(ops.values())
    assert total == pytest.approx(sum(table.milliseconds(one) for one in ops.values()))
    small = Operator("conv", 16, 16, 1, (3, 3), (1, 1), (1, 1), (1, 1), (14, 14), True)
    large = small.at(128, 128)
    lines = [Operator("linear", 64, n, size=(16,)) for n in (8, 4096)]
    table.measure([small, large, *lines])
    assert 4 * table.milliseconds(small) < table.milliseconds(large)
    assert 4 * table.milliseconds(lines[0]) < table.milliseconds(lines[1])
    again = LatencyTable(path, int8=int8)
    assert again.entries == table.entries
    assert all(value >= 0 for value in table.entries.values())


@needs_onnx
def test_another_machine_begins_anew_and_noise_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"made_with": {"processor": "an abacus"}, "milliseconds": {"a": 1}}))
    assert LatencyTable(path).entries == {}
    for text in ("", "[]", "{}", "\x00"):
        path.write_text(text)
        with pytest.raises(BadInput, match=r"table\.json"):
            LatencyTable(path)
    with pytest.raises(WrongUse):
        LatencyTable(tmp_path / "new.json", threads=0)
