"""What formats refuse: numbers beyond their scale, and importance that is none."""

from __future__ import annotations

import pytest
import torch

from lighten.errors import BadInput
from lighten.formats.int_group import pack_bits, unpack_bits
from lighten.registry import formats

SEARCHED = ["int4_g128", "int2_channel_sym", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"]


@pytest.mark.parametrize("name", [*SEARCHED, "f16"])
def test_a_weight_beyond_the_scale_is_refused_with_its_value(name: str) -> None:
    w = torch.ones(2, 256)
    w[1, 7] = -1e12
    with pytest.raises(BadInput, match=rf"{name}.*1e\+12"):
        formats[name].fit(w)


@pytest.mark.parametrize("name", SEARCHED)
def test_a_large_weight_within_the_scale_is_kept(name: str) -> None:
    f, w = formats[name], torch.ones(2, 256)
    w[1, 7] = -60000.0
    grid = f.fit(w)
    got = f.decode(f.encode(w, grid), grid)
    assert got[1, 7] == pytest.approx(-60000.0, rel=0.01)


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("value", [float("nan"), -1.0, float("inf")])
def test_importance_that_is_none_is_refused(name: str, value: float) -> None:
    importance = torch.ones(256)
    importance[3] = value
    with pytest.raises(BadInput, match="importance"):
        formats[name].fit(torch.ones(2, 256), importance)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n", [1, 5, 8, 37])
def test_bits_are_packed_from_the_lowest(bits: int, n: int) -> None:
    g = torch.Generator().manual_seed(n)
    codes = torch.randint(0, 1 << bits, (3, n), generator=g).to(torch.uint8)
    packed = pack_bits(codes, bits)
    expected = [sum(int(c) << (bits * i) for i, c in enumerate(row)) for row in codes]
    assert [int.from_bytes(bytes(row.tolist()), "little") for row in packed] == expected
    assert packed.shape == (3, (n * bits + 7) // 8)
    assert torch.equal(unpack_bits(packed, bits, n), codes)


def test_the_fit_does_not_depend_on_the_number_of_threads() -> None:
    w = torch.randn(70, 1024, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    grids = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            grids.append(formats["q4_k"].fit(w))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(grids[0][k], grids[1][k]) for k in grids[0])
