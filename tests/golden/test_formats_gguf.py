"""The GGUF types against the `gguf` package: the same bytes mean the same numbers, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from lighten.registry import formats

BLOCKED = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"]
BLOCKED += ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"]


def kind(name: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[name.upper()]


@pytest.mark.parametrize("name", [*BLOCKED, "f16", "bf16", "f32"])
def test_bits_are_those_of_the_format(name: str) -> None:
    per, size = GGML_QUANT_SIZES[kind(name)]
    assert formats[name].bits(1024) == 8 * size / per


@pytest.mark.parametrize("name", BLOCKED)
def test_any_bytes_decode_to_the_same_numbers(name: str) -> None:
    f, rows, columns = formats[name], 12, 768
    per, size = GGML_QUANT_SIZES[kind(name)]
    random = np.random.default_rng(1).integers(0, 256, (rows, columns // per * size), np.uint8)
    codes, grid = f.unpack({"bytes": torch.from_numpy(random)}, (rows, columns))
    # random bytes also spell infinite and NaN scales, which nothing writes
    grid = {k: torch.nan_to_num(v, 1.0, 1.0, -1.0) for k, v in grid.items()}
    stored = f.pack(codes, grid)["bytes"].numpy()
    assert stored.shape == random.shape
    assert (stored != random).mean() < 0.01
    theirs = torch.from_numpy(dequantize(stored, kind(name)))
    assert torch.equal(f.decode(codes, grid), theirs)
    again, grid_again = f.unpack({"bytes": torch.from_numpy(stored)}, (rows, columns))
    assert torch.equal(again, codes)
    assert torch.equal(f.decode(again, grid_again), theirs)


@pytest.mark.parametrize("name", BLOCKED)
def test_fitted_weights_decode_to_the_same_numbers(name: str) -> None:
    f = formats[name]
    w = torch.randn(6, 1024, generator=torch.Generator().manual_seed(0)) * 0.03
    grid = f.fit(w)
    codes = f.encode(w, grid)
    theirs = dequantize(f.pack(codes, grid)["bytes"].numpy(), kind(name))
    assert torch.equal(f.decode(codes, grid), torch.from_numpy(theirs))


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_floats_round_as_theirs(name: str) -> None:
    f = formats[name]
    w = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    w[0, :6] = torch.tensor([0.0, -0.0, 1e-8, 3e-5, 1 + 2**-11, 1 + 3 * 2**-11])
    w[1, :2] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])
    ours = f.pack(f.encode(w, f.fit(w)), {})["bytes"].numpy()
    theirs = quantize(w.numpy(), kind(name))
    assert np.array_equal(ours, np.ascontiguousarray(theirs).view(np.uint8).reshape(6, -1))


@pytest.mark.parametrize("name", ["q4_0", "q5_0", "q4_1", "q5_1", "q8_0"])
def test_encoders_agree_on_the_same_scale(name: str) -> None:
    """Blocks whose extremes give a scale that float16 holds exactly; ties, which differ, aside."""
    f = formats[name]
    g = torch.Generator().manual_seed(2)
    scale = torch.randint(1, 64, (400, 1), generator=g) / 4096.0
    u = torch.rand(400, 32, generator=g)
    if name.endswith("_1"):
        top = 15 if name == "q4_1" else 31
        x = u * top
        x[:, 0], x[:, 1] = 0, top
        w = scale * (x - 7)
    else:
        low = {"q4_0": -8, "q5_0": -16, "q8_0": -127}[name]
        x = (2 * u - 1) * (-low - 0.6)
        x[:, 3] = low
        w = scale * x
    theirs = quantize(w.numpy(), kind(name))
    codes, grid = f.unpack({"bytes": torch.from_numpy(theirs)}, (400, 32))
    assert torch.equal(f.encode(w, grid), codes)
