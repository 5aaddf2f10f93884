"""A network and its example inputs: what they must be is told before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lighten
from lighten.errors import WrongUse
from lighten.network import Network


class Sum(nn.Module):
    """Takes two tensors, and maybe a third."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor, z: Tensor | None = None) -> Tensor:
        out: Tensor = self.head(self.body(x + y if z is None else x + y + z).relu())
        return out


X = torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
TWO = (X[:2], X[:2])


@pytest.mark.parametrize("count", [1, 4])
def test_as_many_example_inputs_as_its_forward_takes(count: int) -> None:
    with pytest.raises(WrongUse, match=rf"Sum takes \(x: .*example inputs are {count}") as caught:
        Network.of(Sum(), (X[:2],) * count)
    assert "each argument" in caught.value.hint
    assert len(Network.of(Sum(), TWO).inputs) == 2
    assert len(Network.of(Sum(), (*TWO, X[:2])).inputs) == 3


@pytest.mark.parametrize(
    "verb",
    [
        lambda m, out: lighten.prune(
            m, TWO, budget="0.5 macs", data=X, criterion="l2", compensate=False
        ),
        lambda m, out: lighten.recover(m, m, TWO, data=X, length="2steps"),
        lambda m, out: lighten.distill(m, m, X, example_inputs=TWO, length="2steps", out=out),
        lambda m, out: lighten.compress(m, TWO, budget="0.5 macs", data=X, out=out),
    ],
    ids=["prune", "recover", "distill", "compress"],
)
def test_data_of_one_tensor_is_too_little_for_two_inputs(
    tmp_path: Path, verb: Callable[[nn.Module, Path], Any]
) -> None:
    pytest.importorskip("lightning", reason="learning needs lightning")
    with pytest.raises(WrongUse, match="takes 2 inputs, and the data gives 1") as caught:
        verb(Sum().eval(), tmp_path / "run")
    assert "one tensor" in caught.value.hint
