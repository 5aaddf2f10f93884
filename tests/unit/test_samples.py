"""Data from anything: split once, in order, labels beside, bad data refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lighten.errors import BadInput, WrongUse
from lighten.samples import samples

X = torch.arange(40.0).view(20, 2)
Y = torch.arange(20)


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        DataLoader(TensorDataset(X, Y), batch_size=3),
        [(X[:7], Y[:7]), (X[7:], Y[7:])],
        (X.numpy(), Y.numpy()),
    ],
    ids=["pair", "loader", "list", "arrays"],
)
def test_every_kind_of_data_gives_the_same_split(data: object) -> None:
    found = samples(data, calibration=5)
    assert torch.equal(found.calibration, X[:5])
    assert torch.equal(found.held_out, X[5:])
    assert found.labels is not None
    assert torch.equal(found.labels, Y[5:])
    assert found.digest == samples((X, Y), calibration=5).digest


def test_without_labels_there_are_none() -> None:
    for data in (X, X.numpy(), [X[:9], X[9:]], np.asarray(X)):
        assert samples(data, calibration=5).labels is None


def test_given_test_data_is_measured_on_whole() -> None:
    found = samples(X, calibration=8, test=(X + 100, Y))
    assert len(found.calibration) == 8
    assert torch.equal(found.held_out, X + 100)


def test_little_data_is_shared() -> None:
    found = samples(X, calibration=1000)
    assert (len(found.calibration), len(found.held_out)) == (8, 12)


def test_a_seed_draws_from_the_whole_and_never_twice() -> None:
    found = samples((X, Y), calibration=8, seed=3)
    drawn = torch.cat([found.calibration, found.held_out])[:, 0] / 2
    assert sorted(drawn.tolist()) == list(range(20))
    assert not torch.equal(found.calibration, X[:8])
    assert torch.equal(found.labels, found.held_out[:, 0].long() // 2)


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (3, WrongUse, "is no data"),
        ([], BadInput, "no batch"),
        (["a"], BadInput, "a batch is a str"),
        (X[:1], BadInput, "two are needed"),
        ((X, Y[:3]), BadInput, "20 inputs and 3 labels"),
        (X * float("nan"), BadInput, "NaN"),
    ],
)
def test_bad_data_is_refused(data: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        samples(data)
