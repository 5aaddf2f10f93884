"""A trained ResNet for CIFAR-10: half of its multiply-adds, distilled, then 8-bit integers.

python examples/cifar10.py --model resnet56
python examples/cifar10.py --model resnet56 --recover 10epochs
python examples/cifar10.py --quick

The pruned network is distilled: for two epochs, some ten minutes of one core, or what --recover
says, it learns from the original, without labels, on all training images; with --recover none
nothing is trained. Every row is an ONNX file, measured in onnxruntime: accuracy on test images,
size and the time of one image on one thread. The files are left in --out, beside the weights. It
needs lighten[onnx,train].

cifar10.ipynb is the same as a notebook, made from this file by `python scripts/notebook.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from cifar10_data import cifar10
from models import cifar_resnet

import lighten
from lighten.errors import WrongUse
from lighten.images import Images, load_images
from lighten.macs import macs
from lighten.network_weights import load_weights, read_weights
from lighten.runtimes.onnxruntime import Session, latency

SHARED = Path(__file__).resolve().parents[2] / "shared" / "models"


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        steps(args)
    except lighten.UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def steps(args: argparse.Namespace) -> None:
    """Original, pruned, recovered, quantized: each written and measured."""
    # A trained network, a few training images to calibrate on, and test images to measure on.
    weights = args.weights or SHARED / f"{args.model}_cifar10.safetensors"
    if not weights.is_file():
        raise WrongUse(f"there are no weights at {weights}", "--weights w.safetensors")
    model = getattr(cifar_resnet, args.model)()
    load_weights(model, read_weights(weights), str(weights))
    original = lighten.Network.of(model.eval(), torch.zeros(2, 3, 32, 32))
    calibration = load("train", args, 64 if args.quick else args.images)
    test = load("test", args, 256 if args.quick else None)

    # The network as it came. This row is what the others are compared with.
    print(f"{'':10}{'accuracy':>10}{'kB':>10}{'M MACs':>10}{'p50 ms':>10}")
    show("original", original, test, args)

    # Prune: channels go, the least important first, until the budget is met. What read them is
    # solved again by least squares, so most of the accuracy stays without any training.
    pruned = lighten.prune(original, budget=args.budget, data=calibration)
    pruned.save(args.out / "weights")  # lighten.load(cifar_resnet.resnet20, ...) reads it
    show("pruned", pruned, test, args)

    # Distil: the small network learns from the original what it lost. Labels are not needed.
    small = pruned.network
    length = args.recover or ("3steps" if args.quick else "2epochs")
    if length != "none":
        lessons = load("train", args, 512 if args.quick else None)
        small = lighten.recover(
            small, original, data=lessons, length=length, folder=args.out / "recover"
        ).network
        show("recovered", small, test, args)

    # Quantize: weights and what flows between layers become 8-bit integers.
    quantized = lighten.quantize(small, data=calibration)
    show("int8", quantized, test, args)


def show(name: str, made: Any, test: Images, args: argparse.Namespace) -> None:
    """Write it, and print what its file is in onnxruntime."""
    path = lighten.write_onnx(made, args.out / f"{name}.onnx")
    run, right = Session(path), 0
    for start in range(0, test.count, 256):
        rows = slice(start, start + 256)
        found = run(test.tensor(rows))[0].argmax(1)
        right += int((found == test.labels(rows)).sum())
    network = made if isinstance(made, lighten.Network) else made.network
    time = latency(path, seconds=0.3 if args.quick else 3.0).p50
    size, work = path.stat().st_size / 1e3, macs(network).total / 1e6
    share = right / test.count
    print(f"{name:10}{share:>10.2%}{size:>10.0f}{work:>10.2f}{time:>10.3f}", flush=True)


def load(part: str, args: argparse.Namespace, limit: int | None) -> Images:
    """Images as the networks take them."""
    path = cifar10(part, args.data, args.download)
    return load_images(path, size=32, mean="imagenet", std="imagenet", limit=limit)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description="Prune, distil, quantize a CIFAR-10 ResNet.")
    add = found.add_argument
    add("--model", default="resnet20", choices=("resnet20", "resnet32", "resnet56"))
    add("--weights", type=Path, help="its .safetensors; default: beside the project")
    add("--data", type=Path, help="a folder with CIFAR-10, as cifar10_data.py writes it")
    add("--download", action="store_true", help="get CIFAR-10 from its home where it is absent")
    add("--budget", default="0.5 macs", help='what is left, such as "0.5 macs" or "100k params"')
    add("--images", type=int, default=1024, help="training images to calibrate on")
    add("--recover", metavar="LENGTH", help='how long to learn: "10epochs", "500steps" or "none"')
    add("--out", type=Path, default=Path("runs/cifar10"), help="where the files go")
    add("--quick", action="store_true", help="64 images to calibrate on, 256 to test, 3 steps")
    return found


if __name__ == "__main__":
    sys.exit(main())
