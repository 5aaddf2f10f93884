"""ResNet-20 with single weights removed and the others as 8-bit integers, beside a peer's way.

    pip install onnx onnxruntime
    python benchmarks/sparse_integers/run.py WEIGHTS TRAIN TEST

TRAIN, TEST: CIFAR-10 as parquet; WEIGHTS: of the ResNet-20, see benchmarks/recovery. The peer takes
the least weights of the same layers, the same share of each (torch.nn.utils.prune), and rounds with
onnxruntime's static quantizer. Both are calibrated on as many images of the training set, and
onnxruntime computes every accuracy from a file. Files are packed with DEFLATE, as a download would
be, which finds zeros. Nothing is trained but in rows that name a recovery.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import prune as peer

import lighten
from lighten.images import Images, load_images
from lighten.network import Network
from lighten.registry import exporters
from lighten.runtimes.onnxruntime import Session

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))
from cifar import NORM, right, trained  # noqa: E402

FACTORY = str(ROOT / "examples" / "models" / "cifar_resnet.py") + ":resnet20"
CALIBRATION = 1024
SHARES = (None, "0.5", "2:4", "0.7", "0.8")
RECOVERED = {"0.8": "2epochs"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("weights", "train", "test"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    test = load_images(args.test, seed=None, **NORM)
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network = trained("resnet20", args.weights)
        calibration = load_images(args.train, limit=CALIBRATION, **NORM).tensor(slice(None))
        whole = folder / "original.onnx"
        exporters["onnx"].write(network, whole)
        add({"way": "original", "sparsity": None, **_file(whole, test)})
        for share in SHARES:
            for length in dict.fromkeys((None, RECOVERED.get(str(share)))):
                add(_ours(args, share, length, folder, test))
            add(_peer(network, share, calibration, folder, test))
    facts = {
        "network": "resnet20", "test_images": test.count, "calibration": CALIBRATION,
        "torch": torch.__version__.partition("+")[0], "rows": rows,
    }  # fmt: skip
    (HERE / "result.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _ours(
    args: argparse.Namespace, share: str | None, length: str | None, folder: Path, test: Images
) -> dict[str, Any]:
    run = folder / f"{share or 'dense'}-{length}".replace(":", "of")
    found = lighten.compress(
        FACTORY, weights=args.weights, data=args.train, size=32, samples=CALIBRATION,
        sparsity=share, quantize="int8", recover=length, export="checkpoint", out=run, **NORM,
    )  # fmt: skip
    path = lighten.export(run, "onnx")
    weights = [t for t in exporters["onnx"].read(path).values() if t.dim() > 1]
    zeros = sum(int((w == 0).sum()) for w in weights)
    stored = [p for p in found.exported.rglob("*") if p.is_file() and p.name != "README.md"]
    return {
        "way": "lighten", "sparsity": share, "recover": length, **_file(path, test),
        "zeros": zeros / sum(w.numel() for w in weights),
        "checkpoint_bytes": sum(p.stat().st_size for p in stored),
        "checkpoint_packed": _packed(stored, folder),
    }  # fmt: skip


def _peer(
    network: Network, share: str | None, images: Tensor, folder: Path, test: Images
) -> dict[str, Any]:
    """onnxruntime's quantizer behind torch's pruning."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    module = copy.deepcopy(network.module)
    layers = [layer.name.removesuffix(".weight") for layer in network.layers][1:-1]
    for name in layers if share is not None else ():
        part = module.get_submodule(name)
        if ":" in str(share):
            n, m = (int(s) for s in str(share).split(":"))
            peer.custom_from_mask(part, "weight", _of_each(part.weight, n, m))  # type: ignore[no-untyped-call]
        else:
            peer.l1_unstructured(part, "weight", float(str(share)))  # type: ignore[no-untyped-call]
        peer.remove(part, "weight")  # type: ignore[no-untyped-call]
    plain, prepared, path = (folder / f"peer-{step}.onnx" for step in ("float", "ready", "int8"))
    exporters["onnx"].write(network.with_module(module), plain)
    quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
    [key] = Session(plain).names

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.left, None)
            return None if image is None else {key: image[None].numpy()}

    quantize_static(
        str(prepared), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return {"way": "torch + onnxruntime", "sparsity": share, **_file(path, test)}


def _of_each(weight: Tensor, n: int, m: int) -> Tensor:
    """n of each m neighbours along a row, the largest."""
    rows = weight.detach().abs().reshape(-1, m)
    best = rows.topk(n, dim=1).indices
    return torch.zeros_like(rows).scatter_(1, best, 1.0).reshape(weight.shape)


def _file(path: Path, test: Images) -> dict[str, Any]:
    session = Session(path)
    return {
        "accuracy": right(lambda images: session(images)[0], test),
        "onnx_bytes": path.stat().st_size, "onnx_packed": _packed([path], path.parent),
    }  # fmt: skip


def _packed(paths: list[Path], folder: Path) -> int:
    """Bytes of a zip of these files."""
    into = folder / "packed.zip"
    with zipfile.ZipFile(into, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for path in paths:
            file.write(path, path.name)
    return into.stat().st_size


if __name__ == "__main__":
    main()
