"""Memory that a training keeps between its steps, and gives back when it ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lighten import allocator
from lighten.allocator import LARGEST, MMAP_THRESHOLD, MOST_MAPPED, TRIM_THRESHOLD, kept_memory


class Libc:
    """Writes down what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def mallopt(self, which: int, value: int) -> int:
        self.asked.append((which, value))
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.asked.append(("trim", pad))
        return 1


@pytest.fixture
def libc(monkeypatch: pytest.MonkeyPatch) -> Libc:
    found = Libc()
    monkeypatch.setattr(allocator, "_glibc", lambda: found)
    return found


BEGIN = [(MMAP_THRESHOLD, LARGEST), (TRIM_THRESHOLD, LARGEST)]
END = [(MMAP_THRESHOLD, MOST_MAPPED), (TRIM_THRESHOLD, 2 * MOST_MAPPED), ("trim", 0)]


def test_memory_is_kept_while_it_is_open_and_given_back_once(libc: Libc) -> None:
    with kept_memory():
        assert libc.asked == BEGIN
        with kept_memory():  # blocks of a language model, then all of them together
            pass
        assert libc.asked == BEGIN
    assert libc.asked == BEGIN + END


def test_memory_is_given_back_after_an_error(libc: Libc) -> None:
    with pytest.raises(KeyboardInterrupt), kept_memory():
        raise KeyboardInterrupt
    assert libc.asked == BEGIN + END
    assert allocator._inside == 0


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert allocator._glibc() is None
    with kept_memory():
        assert float(torch.ones(3).sum()) == 3


@pytest.mark.skipif(allocator._glibc() is None, reason="another libc than glibc")
def test_glibc_takes_what_it_is_told() -> None:
    libc = allocator._glibc()
    assert libc.mallopt(MMAP_THRESHOLD, MOST_MAPPED) == 1
    with kept_memory():
        assert torch.zeros(1 << 24).sum() == 0
