"""The peers: onnxruntime's static quantizer and NNCF with OpenVINO, on the same ONNX and images.

    pip install onnx onnxruntime nncf openvino
    python benchmarks/efficientnet_int8/peer.py FOLDER

FOLDER has float.onnx and images.npz (calibration, test); for each peer NAME this writes NAME.npy,
its outputs for the test images, and NAME.onnx or NAME.xml. Needs no torch. Called by run.py.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    folder = Path(sys.argv[1])
    with np.load(folder / "images.npz") as arrays:
        calibration, test = arrays["calibration"], arrays["test"]
    seconds = {}
    for name, method in (("ort_minmax", "MinMax"), ("ort_entropy", "Entropy"),
                         ("ort_percentile", "Percentile")):  # fmt: skip
        began = time.monotonic()
        _onnxruntime(folder, name, method, calibration)
        seconds[name] = time.monotonic() - began
        np.save(folder / f"{name}.npy", _run_onnx(folder / f"{name}.onnx", test))
    try:
        began = time.monotonic()
        model = _nncf(folder, calibration)
        seconds["nncf"] = time.monotonic() - began
        outputs, p50 = _run_openvino(model, test)
        np.save(folder / "nncf.npy", outputs)
        (folder / "nncf.json").write_text(json.dumps({"p50_ms": p50}))
    except ImportError as error:
        print(f"without NNCF: {error}", file=sys.stderr)
    (folder / "seconds.json").write_text(json.dumps(seconds))


def _onnxruntime(folder: Path, name: str, method: str, calibration: Any) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = folder / "prepared.onnx"
    if not prepared.exists():
        quant_pre_process(str(folder / "float.onnx"), str(prepared), skip_symbolic_shape=True)
    session = _session(folder / "float.onnx")
    key = session.get_inputs()[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.left, None)
            return None if image is None else {key: image[None]}

    quantize_static(
        str(prepared), str(folder / f"{name}.onnx"), Reader(), quant_format=QuantFormat.QDQ,
        per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method),
    )  # fmt: skip


def _nncf(folder: Path, calibration: Any) -> Any:
    import nncf
    import openvino

    model = openvino.Core().read_model(folder / "float.onnx")
    dataset = nncf.Dataset(list(calibration), lambda image: image[None])
    quantized = nncf.quantize(model, dataset, subset_size=len(calibration))
    openvino.save_model(quantized, folder / "nncf.xml", compress_to_fp16=False)
    return quantized


def _run_onnx(path: Path, test: Any) -> Any:
    session = _session(path)
    key = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {key: image[None]})[0] for image in test])


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run_openvino(model: Any, test: Any) -> tuple[Any, float]:
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1})
    outputs, times = [], []
    for image in test:
        began = time.perf_counter()
        outputs.append(next(iter(compiled(image[None]).values())).copy())
        times.append(1000 * (time.perf_counter() - began))
    return np.concatenate(outputs), float(np.median(times[10:]))


if __name__ == "__main__":
    main()
