"""A MobileNet for images of 32x32: what of it can shrink, then half of its parameters.

python examples/mobilenet.py --out runs/mobilenet

The weights are random unless --weights gives trained ones, and so is the data unless --data does:
then the sizes and times are true, and what is said of quality means nothing. Fewer parameters
need not be faster: --budget "50% ms" asks for that.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from models.mobilenet import mobilenet

import lighten
from lighten.network_weights import load_weights, read_weights


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compress a MobileNetV2 for small images.")
    parser.add_argument("--width", type=float, default=0.5, help="times its channels")
    parser.add_argument("--weights", type=Path, help="its .safetensors; without: random")
    parser.add_argument("--data", help="images to calibrate and measure on; without: random")
    parser.add_argument("--budget", default="50% params")
    parser.add_argument("--quick", action="store_true", help="40 examples only")
    parser.add_argument("--out", default="runs/mobilenet", help="the run's folder")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = mobilenet(width=args.width).eval()
    example = torch.zeros(2, 3, 32, 32)
    count = 40 if args.quick else 160
    try:
        if args.weights is None:
            print("random weights: only sizes and times mean something", file=sys.stderr)
        else:
            load_weights(model, read_weights(args.weights), str(args.weights))
        for axis in lighten.inspect(model, example)["axes"]:
            share, why = axis["macs_share"], axis["locked"] or ""
            print(
                f"{axis['units']:>5} {axis['kind']:10}{share:>7.1%} of MACs  {axis['axis']} {why}"
            )
        result = lighten.compress(
            model, example, budget=args.budget, data=args.data or torch.randn(count, 3, 32, 32),
            mean="imagenet", std="imagenet", samples=2 * count,
            out=args.out,
        )  # fmt: skip
    except lighten.UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for what in ("parameters", "macs", "bytes", "p50_ms"):
        before, after = (result.metrics[side].get(what) for side in ("before", "after"))
        if before is not None:
            print(f"{what:12}{before:>16,.6g}{after:>16,.6g}{after / before:>8.2f}x")
    for problem in result.metrics["problems"]:
        print(f"problem: {problem}", file=sys.stderr)
    print(result.exported)
    return 1 if result.metrics["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
