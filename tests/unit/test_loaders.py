"""Data as users give it: read to its end, labels whole or not at all, mistakes told at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lighten.errors import BadInput, UserError, WrongUse
from lighten.feed import feed_of
from lighten.loaders import (
    as_labels,
    batch_of,
    check_classes,
    check_finite,
    length_of,
    read_batches,
    read_dataset,
)
from lighten.samples import samples
from lighten.training_data import collected, training_data

X = torch.arange(80.0).view(40, 2)
Y = torch.arange(40) % 4


class Short:
    """A loader that says that it has more batches than it gives."""

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(X.split(10), Y.split(10), strict=True))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


class Examples(Dataset[Any]):
    """By number, and no batches: what DataLoader takes."""

    def __init__(self, count: int = 40) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return X[i], int(Y[i])


class Texts(Dataset[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> Any:
        return object()


class Boundless(Dataset[Any]):
    def __getitem__(self, i: int) -> Any:
        return X[i % 40]


@pytest.mark.parametrize("read", [samples, collected, training_data])
def test_data_that_ends_before_its_length_is_damaged(read: Any) -> None:
    with pytest.raises(BadInput, match="ended after 4 batches, it said it had 10"):
        read(Short())


class Noisy(TensorDataset):
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return x + torch.randn(x.shape), y


def test_a_loader_that_shuffles_is_read_the_same_way_each_time() -> None:
    state = torch.get_rng_state()
    loader = DataLoader(Noisy(X, Y), 7, shuffle=True)
    x, y = read_batches(loader)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)  # whatever a program draws before it calls again
    again, labels = read_batches(loader)
    assert torch.equal(x, again)
    assert y is not None
    assert labels is not None
    assert torch.equal(y, labels)
    assert not torch.equal(y, Y)
    assert len({round(float(v), 3) for v in (x.sort(0).values - X).flatten()}) > 40


def test_a_loader_of_which_enough_was_read_may_go_on() -> None:
    x, y = read_batches(Short(), most=25)
    assert len(x) == 25
    assert y is not None
    assert len(y) == 25


def test_a_stream_has_no_length_and_may_end_anywhere() -> None:
    loader = DataLoader(Stream(), 16)
    assert length_of(loader) is None
    assert length_of([1, 2]) == 2
    assert len(samples(loader, calibration=5).held_out) == 35
    assert feed_of(loader, 16, 1, 0, 0, 1).per_epoch is None


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int16, torch.bool, torch.int64])
def test_whole_numbers_of_any_kind_are_labels(kind: torch.dtype) -> None:
    y = (Y % 2).to(kind)
    for data in ((X, y), DataLoader(TensorDataset(X, y), 8), (X.numpy(), y.numpy())):
        found = samples(data, calibration=5)
        assert found.labels is not None
        assert found.labels.dtype == torch.int64
        kept = training_data(data, tested=True)
        assert kept.labels is not None
        assert kept.course.labels is not None
        assert kept.course.labels.dtype == kept.labels.dtype == torch.int64


def test_a_column_of_labels_is_a_row_of_them() -> None:
    for data in ((X, Y[:, None]), DataLoader(TensorDataset(X, Y[:, None]), 8)):
        found = samples(data, calibration=5)
        assert found.labels is not None
        assert torch.equal(found.labels, Y[5 : 5 + len(found.labels)])
    assert as_labels(torch.zeros(3, 1)).shape == (3,)
    assert as_labels(torch.zeros(3, 2)).shape == (3, 2)


def test_labels_come_as_lists_and_arrays_too() -> None:
    for y in ([1, 2], np.array([1, 2], dtype=np.int32)):
        _, found = batch_of((X[:2], y))
        assert found is not None
        assert found.tolist() == [1, 2]


def test_labels_with_some_batches_alone_are_a_mistake() -> None:
    some = [(X[:8], Y[:8]), X[8:16], (X[16:], Y[16:])]
    for read in (samples, collected, training_data):
        with pytest.raises(BadInput, match="1 of 3 batches have no labels, the first of them") as e:
            read(some)
        assert "-100" in e.value.hint


def test_what_is_no_label_is_left_out_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for beside in (torch.zeros(8, 3, 3), "a name", {"box": 1}):
        x, y = read_batches([(X[:8], beside)] * 2)
        assert len(x) == 16
        assert y is None
        assert capsys.readouterr().err.count("beside") == 1  # once, not for each batch


def test_a_dataset_is_read_as_a_loader_of_it() -> None:
    state = torch.get_rng_state()
    for data in (Examples(), TensorDataset(X, Y)):
        found = samples(data, calibration=5)
        assert found.digest == samples((X, Y), calibration=5).digest
        assert samples(data, seed=3).digest == samples((X, Y), seed=3).digest
        assert training_data(data, seed=3).digest == training_data((X, Y), seed=3).digest
    assert torch.equal(torch.get_rng_state(), state)
    x, y = read_dataset(Examples(), torch.tensor([7, 3]))
    assert torch.equal(x, X[[7, 3]])
    assert y is not None
    assert torch.equal(y, Y[[7, 3]])


def test_no_example_with_a_label_is_as_none() -> None:
    none = torch.full((40,), -100)
    assert samples((X, none)).labels is None
    assert training_data((X, none)).labels is None


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: samples(Texts()), BadInput, "examples of a Texts make no batch: TypeError"),
        (lambda: collected(Texts()), BadInput, "examples of a Texts make no batch"),
        (lambda: collected(Boundless()), WrongUse, "a Boundless says not how many"),
        (lambda: samples(Boundless()), WrongUse, "a Boundless says not how many"),
        (lambda: collected(3), WrongUse, "a int is no data"),
        (lambda: read_batches([]), BadInput, "no batch"),
        (lambda: read_batches([X, X[:, :1]]), BadInput, r"batch 1 has examples \(1,\), those"),
        (lambda: read_batches([(X, Y[:3])]), BadInput, "a batch of 40 inputs has 3 labels"),
        (lambda: training_data((X, Y[:3])), BadInput, "40 inputs and 3 labels"),
        (lambda: check_finite(X / X), BadInput, "first in example 0 .1 of 40 examples"),
        (lambda: training_data(X / X, tested=True), BadInput, "NaN or infinite values"),
        (lambda: training_data(X, held_out=X / X), BadInput, "NaN or infinite values"),
        (lambda: training_data(X, held_out=X[:, :1]), BadInput, r"held out are \(1,\), those to"),
        (lambda: check_classes(Y, 3, "it"), BadInput, "it: the label of example 3 is 3, but the"),
        (lambda: check_classes(Y - 1, 4, "it"), BadInput, "example 0 is -1"),
        (lambda: check_classes(Y.float(), 4, "it"), BadInput, "labels are torch.float32"),
        (lambda: training_data((X, Y)).check(3), BadInput, "the data: the label of example 3 is 3"),
    ],
)
def test_a_mistake_is_told(call: Any, kind: type[UserError], words: str) -> None:
    with pytest.raises(kind, match=words) as error:
        call()
    assert error.value.hint
