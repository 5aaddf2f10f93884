"""CIFAR-10 and its ResNets, as the benchmarks on them take both."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lighten
from lighten.images import Images
from lighten.network_weights import load_weights, read_weights
from lighten.stepwise import divergence as apart

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "models"))
import cifar_resnet

NORM: dict[str, Any] = {"mean": "imagenet", "std": "imagenet"}
TRAINING = 49_000
"""Images that are learned from; the others of the training set choose the best state."""


def trained(name: str, weights: Path) -> lighten.Network:
    """name: of its function, such as "resnet56"."""
    model = getattr(cifar_resnet, name)()
    load_weights(model, read_weights(weights), str(weights))
    return lighten.Network.of(model.eval(), torch.zeros(2, 3, 32, 32))


@torch.no_grad()
def right(run: Callable[[Tensor], Tensor], test: Images, batch: int = 250) -> float:
    """Share of the test images whose likeliest class is the label. run: images -> logits."""
    found = 0
    for start in range(0, test.count, batch):
        rows = slice(start, start + batch)
        found += int((run(test.tensor(rows)).argmax(1) == test.labels(rows)).sum())
    return found / test.count


@torch.no_grad()
def divergence(
    run: Callable[[Tensor], Tensor], teacher: Callable[[Tensor], Tensor], test: Images,
    batch: int = 250,
) -> float:  # fmt: skip
    """KL divergence from the teacher, in nats, the mean over the test images."""
    total = 0.0
    for start in range(0, test.count, batch):
        images = test.tensor(slice(start, start + batch))
        total += len(images) * float(apart(teacher(images), run(images)))
    return total / test.count
