"""Networks that are elsewhere for a while: `meta` stands in for a device that is not here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lighten.borrowed import borrowed, send
from lighten.network import Network
from lighten.transforms.fold_batchnorm import fold_batchnorm

META = torch.device("meta")


class Places(nn.Module):
    """Adds to each place what it has learned of it; places are made on the input's device."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Conv1d(3, 4, 1)
        self.norm = nn.BatchNorm1d(4)
        self.place = nn.Embedding(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[2], device=x.device)
        found = self.norm(self.into(x)).transpose(1, 2) + self.place(at)
        return found + at[None, :, None]


def test_a_graph_makes_its_tensors_where_it_was_sent() -> None:
    x = torch.randn(2, 3, 5)
    graph = fold_batchnorm(Network.of(Places().eval(), x)).module
    before = graph(x)
    with pytest.raises(RuntimeError, match="meta"):  # what moving alone leaves behind
        graph.to(META)(x.to(META))
    graph = fold_batchnorm(Network.of(Places().eval(), x)).module
    send(graph, META)
    assert graph(x.to(META)).device == META
    assert graph(x.to(META)).shape == before.shape
    graph.to_empty(device="cpu")
    send(graph, torch.device("cpu"))
    assert graph(x).device.type == "cpu"


def test_what_was_borrowed_comes_back_whatever_happens() -> None:
    lent = nn.Sequential(nn.Linear(2, 2, device=META), nn.Dropout(), nn.ReLU())
    lent[1].eval()
    shared = nn.Sequential(lent[0])  # of another module, as a folded network has its original's

    def fail() -> None:
        with borrowed(lent):
            lent.to_empty(device="cpu").eval()
            assert next(shared.parameters()).device.type == "cpu"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert next(shared.parameters()).device == META
    assert [part.training for part in lent.modules()] == [True, True, False, True]
