"""Which processors cut off sums of products, by what /proc/cpuinfo says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lighten.cpu import saturates


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("processor : 0\nflags\t\t: fpu sse4_2 avx2\n", True),
        ("flags : fpu ssse3\nvmx flags : vnmi\n", True),
        ("flags : avx2 avx512f avx512bw\nflags : avx2 avx512f avx512bw\n", True),
        ("flags : avx2 avx_vnni\n", False),
        ("flags : avx2 avx512f avx512_vnni\n", False),
        ("Features\t: fp asimd asimddp\n", False),
        ("", False),
    ],
)
def test_x86_without_vnni_saturates(tmp_path: Path, text: str, cut: bool) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    assert saturates(path) is cut


def test_nothing_is_assumed_where_nothing_is_known(tmp_path: Path) -> None:
    assert not saturates(tmp_path / "cpuinfo")
    assert saturates() in (True, False)
