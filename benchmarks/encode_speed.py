"""How many weights per second each format fits and encodes (round to nearest, no feedback).

    python benchmarks/encode_speed.py [--formats q4_k q6_k] [--rows 2048] [--json out.json]

One warm-up, then the best of `--repeat` runs on random weights with random importance. Results of
the last recorded run are in encode_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch

from lighten.registry import formats


def speed(name: str, w: torch.Tensor, importance: torch.Tensor, repeat: int) -> dict[str, float]:
    """M weights/s of fit, encode and both together."""
    f = formats[name]
    f.encode(w[:64], f.fit(w[:64], importance))
    fit = encode = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        grid = f.fit(w, importance)
        middle = time.perf_counter()
        f.encode(w, grid)
        end = time.perf_counter()
        fit, encode = min(fit, middle - start), min(encode, end - middle)
    m = w.numel() / 1e6
    return {
        "fit": round(m / fit, 2),
        "encode": round(m / encode, 2),
        "both": round(m / (fit + encode), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="*", help="names (default: all)")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=1536)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    g = torch.Generator().manual_seed(0)
    w = 0.02 * torch.randn(args.rows, args.columns, generator=g)
    importance = torch.exp(1.5 * torch.randn(args.columns, generator=g))
    rows: dict[str, dict[str, float]] = {}
    print(f"{'M weights/s':20}{'fit':>10}{'encode':>10}{'both':>10}")
    for name in args.formats or sorted(formats):
        rows[name] = r = speed(name, w, importance, args.repeat)
        print(f"{name:20}{r['fit']:10.1f}{r['encode']:10.1f}{r['both']:10.1f}", flush=True)
    if args.json:
        facts = {
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "load_before": round(load, 1),  # far above 0: other programs took part of the machine
            "shape": [args.rows, args.columns],
        }
        args.json.write_text(json.dumps({"setup": facts, "mweights_per_s": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
