"""Small convolutional networks that have something to lose, and data for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 16
CLASSES = 5


class Plain(nn.Module):
    """Convolutions with batch norm, a depthwise one among them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, 2, padding=1, groups=16, bias=False), nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Residual(nn.Module):
    """A stem, a residual block with batch norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def trained(kind: type[nn.Module] = Residual, seed: int = 0) -> nn.Module:
    """A network whose norms have seen data, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = kind()
        with torch.no_grad():
            for part in module.modules():
                if isinstance(part, nn.BatchNorm2d):
                    part.weight.uniform_(0.3, 1.5)
                    part.bias.normal_(0, 0.3)
                    part.momentum = None  # running statistics are the mean over batches
            for part in range(4):
                module(images(32, seed=100 + part))
    return module.eval()


def images(count: int, seed: int = 1) -> Tensor:
    """(count, 3, SIDE, SIDE): coarse patterns and some noise, of mean 0."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    fine = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return F.interpolate(coarse, size=SIDE, mode="bilinear", align_corners=False) + 0.3 * fine


@torch.no_grad()
def labels(module: nn.Module, x: Tensor) -> Tensor:
    """What the module says, one in four wrong."""
    found = module(x).argmax(1)
    found[::4] = (found[::4] + 1) % CLASSES
    return found
