"""ResNets for CIFAR-10: pruned, recovered in ten epochs, then 8-bit integers in onnxruntime.

    python benchmarks/recovery/run.py resnet56 WEIGHTS TRAIN TEST --factor 2.11
    python benchmarks/recovery/run.py resnet20 WEIGHTS TRAIN TEST --factor 1.37

The original teaches, on 49,000 training images; 1,000 others choose the best state. What is asked
of the result is measured on all test images. --first prunes less and recovers for a part of the
length, before the rest is pruned. --folder keeps checkpoints: the same line goes on where it was
stopped. Rows are added to result.json, one a network, recipe and seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lighten
from lighten.devices import best_precision, chosen
from lighten.images import load_images
from lighten.macs import macs
from lighten.mirrored import Mirrored
from lighten.runtimes.onnxruntime import Session

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from cifar import NORM, TRAINING, divergence, right, trained  # noqa: E402

CALIBRATION, INTEGERS = 2048, 1024
"""Images that widths and compensation, and that integers are calibrated on."""

RECIPE = (
    "network", "optimizer", "rate", "first", "length", "learn_from", "augment", "mirrored", "batch",
    "seed",
)  # fmt: skip
"""What makes a row of its own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("network", choices=("resnet20", "resnet56"))
    parser.add_argument("weights", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--factor", type=float, required=True, help="MACs are divided by it")
    parser.add_argument(
        "--first", nargs=2, metavar=("FACTOR", "LENGTH"), help="prune to this before, and recover"
    )
    parser.add_argument("--length", default="10epochs", help="of the recovery after all is pruned")
    parser.add_argument("--learn-from", default="logits:1:temperature=4")
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--augment", default="crop+flip")
    parser.add_argument(
        "--mirrored", action=argparse.BooleanOptionalAction, help="the teacher looks twice"
    )
    parser.add_argument("--average", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="of checkpoints and files, to be kept")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.folder is not None:
        _add(_row(args, args.folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        _add(_row(args, Path(folder)))


def _row(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    original = trained(args.network, args.weights)
    train = load_images(args.train, limit=TRAINING, **NORM)
    held_out = load_images(args.train, offset=TRAINING, **NORM)
    test = load_images(args.test, seed=None, **NORM)
    calibration = train.tensor(slice(0, CALIBRATION))
    whole = macs(original).total

    def prune(network: Any, factor: float) -> Any:
        share = whole / factor / macs(network).total
        return lighten.prune(network, budget=f"{share:.4f} macs", data=calibration)

    def recover(pruned: Any, length: str, name: str) -> Any:
        return lighten.recover(
            pruned, original, data=train, held_out=held_out, length=length,
            learn_from=args.learn_from, optimizer=args.optimizer, rate=args.rate,
            average=args.average, batch=args.batch, augment=args.augment,
            mirrored=args.mirrored, folder=folder / name, seed=args.seed,
        )  # fmt: skip

    twice = Mirrored(original.module)
    row: dict[str, Any] = {
        "network": args.network, "original": right(original.module, test),
        "original_mirrored": right(twice, test), "first": args.first,
    }  # fmt: skip
    start, minutes = original, 0.0
    if args.first is not None:
        found = recover(prune(original, float(args.first[0])), args.first[1], "first")
        start, minutes = found.network, found.metrics["minutes"]
        row["first_recovered"] = right(start.module, test)
    pruned = prune(start, args.factor)
    row |= {
        "factor": whole / macs(pruned.network).total, "pruned": right(pruned.network.module, test)
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    found = recover(pruned, args.length, "recover")
    small = found.network
    forms = {
        "float": small,
        "int8": lighten.quantize(small, data=calibration, count=INTEGERS),
        "int8_learned": lighten.quantize(small, data=calibration, count=INTEGERS, learn="100steps"),
    }
    files = {
        name: lighten.write_onnx(form, folder / f"{name}.onnx") for name, form in forms.items()
    }
    return {
        **row, "recovered": right(small.module, test),
        "divergence": divergence(small.module, twice, test),
        **{f"{name}_onnxruntime": right(_session(path), test) for name, path in files.items()},
        **{f"{name}_bytes": path.stat().st_size for name, path in files.items()},
        "test_images": test.count, **found.metrics, "minutes": found.metrics["minutes"] + minutes,
        "average": args.average, "batch": args.batch, "seed": args.seed, "threads": args.threads,
        "precision": best_precision("auto", chosen("auto")),
        "torch": torch.__version__.split("+")[0],
    }  # fmt: skip


def _session(path: Path) -> Callable[[Tensor], Tensor]:
    session = Session(path)
    return lambda images: session(images)[0]


def _add(row: dict[str, Any]) -> None:
    path = HERE / "result.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    rows = [old for old in rows if any(old.get(key) != row[key] for key in RECIPE)] + [row]
    rows.sort(key=lambda row: [str(row.get(key)) for key in RECIPE])
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
