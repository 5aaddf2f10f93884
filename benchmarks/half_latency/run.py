"""Half of the latency in onnxruntime: what `--budget "50% ms"` reaches, and what it costs.

    python benchmarks/half_latency/run.py cifar RESNET20_WEIGHTS TRAIN TEST
    python benchmarks/half_latency/run.py photos PHOTOS

Each network twice: as `compress` decides (8-bit integers first), and with `quantize="none"`, where
structure has to do it alone. Afterwards the original and the result are timed again in turns, which
is the figure that counts: target 0.5, within 5 %. Rows are added to result.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lighten
from lighten.images import load_images
from lighten.runtimes import onnxruntime

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "examples" / "models"))
import cifar_resnet  # noqa: E402
import efficientnet_lite as lite  # noqa: E402

BUDGET = "50% ms"
KEPT = ("accuracy", "top1_agreement", "mean_kld", "bytes", "macs")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=("cifar", "photos"))
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--quantize", nargs="+", default=("auto", "none"))
    args = parser.parse_args()
    for precision in args.quantize:
        row = {"quantize": precision, **(_cifar if args.kind == "cifar" else _photos)(
            args.paths, precision
        )}  # fmt: skip
        _add(row)
        print(json.dumps(row), flush=True)


def _cifar(paths: list[Path], precision: str) -> dict[str, Any]:
    from lighten.network_weights import load_weights, read_weights

    weights, train, test = paths
    model = cifar_resnet.resnet20()
    load_weights(model, read_weights(weights), str(weights))
    norm = {"mean": "imagenet", "std": "imagenet"}
    images = load_images(train, **norm)
    example = images.tensor(slice(0, 2))
    held = load_images(test, seed=None, **norm)
    return _run("ResNet-20", model, example, images, held, precision, 1024)


def _photos(paths: list[Path], precision: str) -> dict[str, Any]:
    images = load_images(
        paths[0], size=lite.SIZE, crop=lite.CROP, mean=(lite.MEAN,) * 3, std=(lite.STD,) * 3,
        seed=None,
    )  # fmt: skip
    model = lite.efficientnet_lite0()
    return _run("EfficientNet-Lite0", model, images.tensor(slice(0, 2)), images, None, precision,
                100)  # fmt: skip


def _run(
    name: str, model: Any, example: Any, data: Any, test: Any, precision: str, count: int
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        result = lighten.compress(
            model, example, budget=BUDGET, data=data, test=test, quantize=precision,
            samples=count, out=Path(folder) / "run",
        )  # fmt: skip
        seconds = time.monotonic() - began
        (original,) = (result.run / "original").glob("*.onnx")
        files = {"before": original, "after": result.exported}
        again = onnxruntime.latencies(files, seconds=6)
    after, before = result.metrics["after"], result.metrics["before"]
    return {
        "network": name, "budget": BUDGET, "seconds": seconds,
        "before_ms": again["before"].p50, "after_ms": again["after"].p50,
        "ratio": again["after"].p50 / again["before"].p50,
        "reference_accuracy": before.get("accuracy"), "before_macs": before["macs"],
        "before_bytes": before["bytes"],
        **{k: after[k] for k in KEPT if k in after}, "plan": result.metrics["plan"],
    }  # fmt: skip


def _add(row: dict[str, Any]) -> None:
    """Put the row in the place of an older one for the same network and precision."""
    path = HERE / "result.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    rows = [r for r in rows if (r["network"], r["quantize"]) != (row["network"], row["quantize"])]
    path.write_text(json.dumps([*rows, row], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
