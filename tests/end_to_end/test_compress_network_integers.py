"""compress() of networks to integers, with and without a budget, and to a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compressed_networks import compress, held_out, size
from lighten import errors
from lighten.registry import exporters
from lighten.runtimes import onnxruntime
from small_networks import trained

pytestmark = pytest.mark.usefixtures("steady")


@pytest.mark.parametrize("quantize", [None, "int8", "w4a8", "w4a4"])
def test_integers_without_a_budget(tmp_path: Path, quantize: str | None) -> None:
    found = compress(tmp_path / "run", quantize=quantize)
    kinds = onnxruntime.operators(found.exported)
    if quantize in (None, "int8"):
        assert kinds.get("QLinearConv", 0) == 3
    before, after = found.metrics["before"], found.metrics["after"]
    assert before["macs"] == after["macs"]
    assert after["bytes"] < before["bytes"]
    assert found.metrics["widths"] == found.metrics["plans"] == []
    # the quality that is told is that of the file in its runtime
    x = held_out()
    [codes] = onnxruntime.run(found.exported, x)
    with torch.no_grad():
        same = (codes.argmax(1) == trained()(x).argmax(1)).float().mean()
    told = found.metrics["after"]["top1_agreement"]["value"]
    assert abs(float(same) - told) <= 2 / len(x)
    assert told > 0.9


def test_nothing_to_do_is_told(tmp_path: Path) -> None:
    with pytest.raises(errors.WrongUse, match="nothing to do"):
        compress(tmp_path / "run", quantize="none")
    assert not (tmp_path / "run").exists()


def test_structure_and_integers(tmp_path: Path) -> None:
    found = compress(tmp_path / "run", budget="0.6 macs", quantize="int8")
    assert found.metrics["after"]["macs"] <= 0.6 * found.metrics["before"]["macs"]
    assert "QLinearConv" in onnxruntime.operators(found.exported)


def test_a_checkpoint(tmp_path: Path) -> None:
    found = compress(tmp_path / "run", budget="0.5 macs", export="checkpoint")
    assert found.exported.is_dir()
    assert found.metrics["after"]["bytes"] == size(found.exported)
    read = exporters["checkpoint"].read(found.exported)
    own = found.module.state_dict()
    assert set(read) == set(own)
    assert all(torch.equal(read[k], t) for k, t in own.items())
    assert "p50_ms" not in found.metrics["after"]
    bytes_too = compress(tmp_path / "two", budget="60%", export="checkpoint", quantize="none")
    assert size(bytes_too.exported) <= 0.6 * bytes_too.metrics["before"]["bytes"]
    with pytest.raises(errors.WrongUse, match="no runtime"):
        compress(tmp_path / "three", budget="50% ms", export="checkpoint")
