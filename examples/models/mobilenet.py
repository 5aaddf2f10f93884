"""A MobileNetV2 for images of 32x32: inverted residuals with depthwise convolutions.

lighten inspect "examples/models/mobilenet.py:mobilenet(width=0.5)" --size 32

*Source:* Sandler et al. 2018, "MobileNetV2", table 2; for small images the first steps of two are
left out, as usual.
"""

from __future__ import annotations

from torch import Tensor, nn

STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
          (6, 320, 1, 1))  # fmt: skip
"""(expansion, channels, blocks, first stride) of each stage."""


class Inverted(nn.Module):
    """Expand, filter each channel, project; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        parts = [_conv(inputs, hidden, 1)] if expansion != 1 else []
        parts.append(_conv(hidden, hidden, 3, stride, groups=hidden))
        self.body = nn.Sequential(*parts)
        self.project = nn.Sequential(
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.body(x))
        return x + y if self.shortcut else y


class MobileNet(nn.Module):
    """width: multiplies all channels, which stay multiples of 8."""

    def __init__(self, width: float = 1.0, classes: int = 10) -> None:
        super().__init__()
        channels = _round(32 * width)
        layers: list[nn.Module] = [_conv(3, channels, 3)]
        for expansion, outputs, blocks, stride in STAGES:
            for i in range(blocks):
                wide = _round(outputs * width)
                layers.append(Inverted(channels, wide, expansion, stride if i == 0 else 1))
                channels = wide
        last = _round(1280 * max(width, 1.0))
        layers.append(_conv(channels, last, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


def _round(channels: float) -> int:
    """The nearest multiple of 8 that loses no more than a tenth."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near if near >= 0.9 * channels else near + 8


def mobilenet(width: float = 1.0, classes: int = 10) -> MobileNet:
    """MobileNetV2 with `width` times its channels."""
    return MobileNet(width, classes)
