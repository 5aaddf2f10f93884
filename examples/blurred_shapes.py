"""A small network and data that it can learn in seconds: ten blurred shapes, shifted and noisy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def shapes(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(count, 1, 16, 16) images and their labels of 0..9; the shapes are the same for any seed."""
    kinds = torch.randn(10, 1, 5, 5, generator=torch.Generator().manual_seed(5))
    kinds = F.interpolate(kinds, size=20, mode="bilinear", align_corners=False)
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=g)
    rows, columns = torch.randint(5, (2, count), generator=g).tolist()
    images = torch.stack(
        [kinds[k, :, r : r + 16, c : c + 16] for k, r, c in zip(labels, rows, columns, strict=True)]
    )
    return images + torch.randn(images.shape, generator=g), labels


def network() -> nn.Module:
    """Three convolutions with batch norm, and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


@torch.no_grad()
def accuracy(module: nn.Module, count: int = 1000) -> float:
    """Of images that training has not seen."""
    images, labels = shapes(count, seed=1)
    return float((module.eval()(images).argmax(1) == labels).float().mean())
