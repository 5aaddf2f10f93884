"""A usual network near SmolLM2-135M-Instruct, with the channels as they were trained.

    python benchmarks/gguf_quality/dither.py

The published weights that pip brings along lie on a Q4_1 grid, and the copy of `rescale.py` has
channels multiplied at random, which scaling columns takes back down to that grid. Here each weight
is moved by a random part of its step on the grid instead: another function, which nothing leads
back to the grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rescale
from gguf import GGUFReader
from peer import cache_dir

MODEL, FOLDER = "smollm2-dithered-f16.gguf", "smollm2-dithered"
"""In the cache folder: as a file for llama.cpp, and as a Hugging Face folder."""


def dithered(cache: Path) -> Path:
    """The cache folder with both forms in it, made where they are absent."""
    if not (cache / FOLDER / "model.safetensors").exists():  # what is written last
        random = np.random.default_rng(0)
        reader, weights = rescale.load(rescale.packaged_model())
        for name, step in steps(reader):
            noise = random.uniform(-0.5, 0.5, (len(step), 32)).astype(np.float32)
            weights[name] += (step[:, None] * noise).reshape(weights[name].shape)
        rescale.write(cache / MODEL, reader, weights)
        rescale.write_folder(cache / FOLDER, cache / MODEL)
    return cache


def steps(reader: GGUFReader) -> Iterator[tuple[str, Any]]:
    """Each Q4_1 tensor's name, and the steps of its blocks of 32 weights: (blocks,) float32."""
    for tensor in reader.tensors:
        if tensor.tensor_type.name == "Q4_1":
            blocks = np.asarray(tensor.data).reshape(-1, 20)  # float16 step and minimum, 16 bytes
            yield tensor.name, blocks[:, :2].copy().view(np.float16)[:, 0].astype(np.float32)


if __name__ == "__main__":
    print(dithered(cache_dir()) / FOLDER)
