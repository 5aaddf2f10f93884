"""OpenVINO: opens an ONNX file and computes with it, on the CPU.

Errors: MissingPackage without the package, BadInput without the file, BadOutput when OpenVINO
refuses the file.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lighten.errors import BadInput, BadOutput, MissingPackage, WrongUse


def available() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("openvino") is not None


def run(path: str | Path, inputs: Sequence[Tensor] | Tensor, *, threads: int = 1) -> list[Tensor]:
    """All outputs of the file for its inputs in order, in float32 where not in integers."""
    try:
        import openvino
    except ImportError as error:
        raise MissingPackage(
            f"the package `openvino` does not load: {error}", "pip install openvino"
        ) from error
    if not Path(path).is_file():
        raise BadInput(f"there is no file `{path}`", "give the path of an .onnx file")
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # or inputs of weight-only layers would be rounded
    }
    try:
        opened = openvino.Core().compile_model(str(path), "CPU", settings)
    except Exception as error:  # its kinds are plain RuntimeErrors, with a trace of C++ files
        raise BadOutput(f"OpenVINO cannot open {path}: {_last(error)}") from error
    if len(given) != len(opened.inputs):
        raise WrongUse(f"{path} has {len(opened.inputs)} inputs and {len(given)} were given")
    try:
        found = opened([x.detach().cpu().numpy() for x in given])
    except Exception as error:
        raise BadOutput(f"OpenVINO cannot run {path}: {_last(error)}") from error
    return [torch.from_numpy(np.array(found[o])) for o in opened.outputs]


def _last(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
