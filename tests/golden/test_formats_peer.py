"""Our encoders against llama.cpp's own, through ggml in the llama-cpp-python package."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from lighten.registry import formats

TYPES = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl"]


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("llama-cpp-python is not installed")
    found = sorted((Path(spec.origin).parent / "lib").glob("*ggml-base.*"))
    if not found:
        pytest.skip("llama-cpp-python brings no ggml-base library")
    library = ctypes.CDLL(str(found[0]))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, pointer, pointer, count, count, count, pointer
    ]  # fmt: skip
    return library


def peer(ggml: ctypes.CDLL, name: str, w: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    kind = GGMLQuantizationType[name.upper()]
    per, size = GGML_QUANT_SIZES[kind]
    source, weights = np.ascontiguousarray(w.numpy()), np.ascontiguousarray(importance.numpy())
    stored = np.zeros((w.shape[0], w.shape[1] // per * size), np.uint8)
    ggml.ggml_quantize_chunk(
        int(kind), source.ctypes.data, stored.ctypes.data, 0, *w.shape, weights.ctypes.data
    )
    return torch.from_numpy(dequantize(stored, kind))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("tails", ["light", "heavy"])
@pytest.mark.parametrize("weighted", [True, False])
def test_error_is_at_most_theirs(ggml: ctypes.CDLL, name: str, tails: str, weighted: bool) -> None:
    g = torch.Generator().manual_seed(5)
    w = 0.02 * torch.randn(64, 1024, generator=g)
    if tails == "heavy":
        w *= torch.exp(0.7 * torch.randn(64, 1024, generator=g))
    imp = torch.exp(1.5 * torch.randn(1024, generator=g)) if weighted else torch.ones(1024)
    f = formats[name]
    grid = f.fit(w, imp)
    ours = (imp * (f.decode(f.encode(w, grid), grid) - w) ** 2).sum()
    theirs = (imp * (peer(ggml, name, w, imp) - w) ** 2).sum()
    assert ours <= theirs
