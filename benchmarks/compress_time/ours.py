"""lighten's calibrate + solve on stored token windows; prints what it took as one line of JSON.

    python benchmarks/compress_time/ours.py MODEL WINDOWS.safetensors

Timed is `lighten.solve.solve`, which also reads the weights from disk and writes the solved ones.
Calibration's speed counts the multiplications of weights and the upper triangles of the Hessians,
not attention's, and divides them by the time of Stream.stats and Stream.advance.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from safetensors.torch import load_file
from usage import used

from lighten.calibrate import Stream
from lighten.model import Model, open_model
from lighten.run import Run
from lighten.solve import Weights, solve
from lighten.types import Plan

SPEC = "int4_g64_sym@gptq"
GEMM = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a Hugging Face folder")
    parser.add_argument("windows", help="safetensors file with `windows` (count, length)")
    arguments = parser.parse_args()
    model, ids = open_model(arguments.model), load_file(arguments.windows)["windows"]
    layers = [la for la in model.layers if la.block is not None and la.kind == "linear"]
    plan = Plan(specs={layer.name: SPEC for layer in layers})
    clock = {"seconds": 0.0}
    for name in ("stats", "advance"):
        setattr(Stream, name, _timed(getattr(Stream, name), clock))
    with (
        tempfile.TemporaryDirectory() as folder,
        Run.open(folder, {"model": model.digest}) as run,
        used() as found,
    ):
        solve(Weights(run, model, plan), ids, {})
    calibration = _operations(model, ids.numel()) / clock["seconds"] / 1e9
    peak = gemm_gflops()
    setup = {
        "layers": len(layers),
        "weights": sum(layer.size for layer in layers),
        "threads": torch.get_num_threads(),
        "batch": Stream.__init__.__kwdefaults__["batch"],
        "versions": {k: version(k) for k in ("lighten", "transformers", "torch")},
    }
    speed = {
        "gemm_peak_gflops": peak,
        "calibration_gflops": calibration,
        "share_of_peak": calibration / peak,
        "calibration_seconds": clock["seconds"],
    }
    print(json.dumps({"used": found, "speed": speed, "setup": setup}))


def _operations(model: Model, tokens: int) -> int:
    """Of both forward passes (stats, advance) and of each distinct Hessian's upper triangle."""
    layers = [layer for layer in model.layers if layer.block is not None]
    widths = {(la.block, la.shares): la.shape[1] for la in layers}
    forward = 2 * sum(layer.size for layer in layers) * tokens
    return 2 * forward + sum(n * (n + 1) for n in widths.values()) * tokens


def gemm_gflops(repeat: int = 7) -> float:
    """The best of some float32 products of two (2048, 2048) matrices."""
    a, b = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM)
    out = a @ b
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * GEMM**3 / best / 1e9


def _timed(fn: Callable[..., Any], clock: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        out = fn(*args, **kwargs)
        clock["seconds"] += time.perf_counter() - start
        return out

    return timed


if __name__ == "__main__":
    main()
