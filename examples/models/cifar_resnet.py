"""The residual networks of He et al. for CIFAR-10: 6n + 2 layers, three stages of n blocks.

lighten compress examples/models/cifar_resnet.py:resnet56 --weights w.safetensors ...

Inputs (n, 3, 32, 32), in [0, 1], then ImageNet's mean and standard deviation.
*Source:* He et al. 2015, "Deep Residual Learning for Image Recognition", section 4.2, shortcuts of
option A: a step of two and zero channels on both sides, no parameters.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.padding:
            x = F.pad(x, (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class ResNet(nn.Module):
    """blocks: of each of the three stages; their widths are 1, 2 and 4 times `width`."""

    def __init__(self, blocks: int, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(blocks, width, width, 1)
        self.layer2 = _stage(blocks, width, 2 * width, 2)
        self.layer3 = _stage(blocks, 2 * width, 4 * width, 2)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first = Block(inputs, outputs, stride)
    return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))


def resnet20(width: int = 16, classes: int = 10) -> ResNet:
    """20 layers, 0.27 million parameters."""
    return ResNet(3, width, classes)


def resnet32(width: int = 16, classes: int = 10) -> ResNet:
    """32 layers, 0.46 million parameters."""
    return ResNet(5, width, classes)


def resnet56(width: int = 16, classes: int = 10) -> ResNet:
    """56 layers, 0.85 million parameters."""
    return ResNet(9, width, classes)
