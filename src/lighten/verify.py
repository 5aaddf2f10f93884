"""Read back what was written, and compare: every exporter has to pass this one check."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lighten.errors import BadOutput
from lighten.progress import note
from lighten.types import Compressed, Exporter

_HINT = "please report this with the model's name; nothing else was changed"


def verify(exporter: Exporter, model: Any, weights: Mapping[str, Compressed], path: Path) -> None:
    """Every compressed layer reads back as `dense()` to the bit (in the dtype that it is read in),
    every other tensor as the source has it; raises BadOutput with the first tensor that does not.
    """
    layers = {layer.name: layer for layer in model.layers}
    there = exporter.read(path, model)
    for name, source in model.tensors.items():
        if name not in there:
            raise BadOutput(f"`{path}` has no tensor `{name}`", _HINT)
        found = there[name]
        if name in weights:
            expected = weights[name].dense()
            expected = expected.T if layers[name].transposed else expected
            expected = expected.reshape(source.shape)
            same = found.shape == source.shape and torch.equal(found, expected.to(found))
        else:
            same = _carried_over(found, source.load())
        if not same:
            raise BadOutput(f"tensor `{name}` does not read back from `{path}` as written", _HINT)


def _carried_over(found: Tensor, source: Tensor) -> bool:
    """Equal, or rounded once to the type it is stored as, or off by an added 1 in float32."""
    if found.shape != source.shape:
        return False
    if torch.equal(found, source.to(found)):
        return True
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(found.float(), source.to(dtype).float()):
            return True
    # norms that are stored as 1 + w lose what float32 cannot hold beside the 1
    return source.dim() == 1 and torch.allclose(found.float(), source.float(), 2.0**-23, 2.0**-23)


def opens_in_llama_cpp(path: Path) -> None:
    """Open a GGUF in llama.cpp, where it is installed, and compute two tokens; raises BadOutput."""
    from lighten.runtimes import llama_cpp

    if llama_cpp.available():
        llama_cpp.check(path)
    else:
        note("llama.cpp is not installed (pip install lighten[llama]); the file was read back only")
