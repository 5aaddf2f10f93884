"""Batches of a loader: a step gets what it would have had, whatever was passed over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lighten.feed import LoaderFeed
from linear_students import INPUTS


class Noisy(TensorDataset):
    """Examples that a transform changes at random whenever they are read."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        (x,) = super().__getitem__(index)
        return (x + torch.randn(x.shape),)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loader_with_random_transforms_gives_a_step_what_it_would_have_had(
    accumulate: int,
) -> None:
    feeds = [
        LoaderFeed(DataLoader(Noisy(INPUTS), 8, shuffle=True), accumulate, seed=3) for _ in "ab"
    ]
    for step in range(6):
        torch.manual_seed(step)  # as a training does
        whole = feeds[0].at(step)
    torch.manual_seed(5)
    resumed = feeds[1].at(5)
    assert len(whole) == len(resumed) == accumulate
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole, resumed, strict=True))
    assert not torch.equal(feeds[0].at(6)[0][0], whole[0][0])
