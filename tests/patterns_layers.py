"""Patterns of convolutions: plain, in residuals and dense blocks, in groups, normed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pattern_parts import Made, Run, conv, image, pattern


@pattern({"0.weight": 8, "3.weight": 6})
def plain() -> Made:
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 4)
    ), image(batch=1)


@pattern({"a.weight": 8, "b.weight": 8, "d.weight": 6})
def residual() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        x = F.relu(m.na(m.a(x)))
        y = m.c(F.relu(m.b(x)))
        x = F.relu(x + m.nc(y))
        return m.head(F.relu(m.d(x)).mean((2, 3)))

    return Run(forward, a=conv(3, 8), na=nn.BatchNorm2d(8), b=conv(8, 8), c=conv(8, 8),
               nc=nn.BatchNorm2d(8), d=conv(8, 6), head=nn.Linear(6, 5)), image()  # fmt: skip


@pattern({"stem.weight": 4, "c.weight": 6, "d.weight": 4, "e.weight": 4}, own=False)
def padded_shortcut() -> Made:
    """Stride-2 slicing and zero channels on both sides, as the CIFAR ResNets do it."""

    def forward(m: Run, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        y = m.d(F.relu(m.c(x)))[:, :, ::2, ::2]
        x = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return m.head(F.relu(m.e(x)).mean((2, 3)))

    return Run(forward, stem=conv(3, 4), c=conv(4, 6), d=conv(6, 8), e=conv(8, 4),
               head=nn.Linear(4, 3)), image()  # fmt: skip


@pattern({"a.weight": 4, "b.weight": 6, "c.weight": 8})
def dense_block() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        a = F.relu(m.a(x))
        b = F.relu(m.b(torch.cat([x, a], 1)))
        c = F.relu(m.c(m.n(torch.cat([x, a, b], 1))))
        return m.head(torch.cat([a, b, c], 1).mean((2, 3)))

    return Run(forward, a=conv(3, 4), b=conv(7, 6), n=nn.BatchNorm2d(13), c=conv(13, 8),
               head=nn.Linear(18, 3)), image()  # fmt: skip


@pattern({"0.weight": 8, "6.weight": 12})
def depthwise() -> Made:
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU6(), conv(8, 8, groups=8), nn.BatchNorm2d(8),
        nn.ReLU6(), conv(8, 12, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 3),
    ), image()  # fmt: skip


@pattern({"0.weight": 4})
def depthwise_multiplier() -> Made:
    return nn.Sequential(
        conv(3, 4), nn.ReLU(), conv(4, 8, groups=4), nn.ReLU(), conv(8, 3)
    ), image()


@pattern({"0.weight": 4, "2.weight": 6, "4.weight": 5})
def grouped() -> Made:
    """Channel j of every group is a unit."""
    return nn.Sequential(
        conv(3, 8), nn.ReLU(), conv(8, 12, groups=2), nn.ReLU(), conv(12, 5), nn.ReLU(), conv(5, 3)
    ), image()


@pattern({"0.weight": 4, "3.weight": 8})
def group_norm() -> Made:
    return nn.Sequential(
        conv(3, 8), nn.GroupNorm(4, 8), nn.ReLU(), conv(8, 8), nn.GroupNorm(8, 8), conv(8, 3)
    ), image()


@pattern({"0.weight": 8, "3.weight": 6})
def instance_norm() -> Made:
    return nn.Sequential(
        conv(3, 8), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), conv(8, 6), nn.InstanceNorm2d(6),
        nn.ReLU(), conv(6, 3),
    ), image()  # fmt: skip


@pattern({"0.weight": 4, "3.weight": 6})
def bare_norms() -> Made:
    return nn.Sequential(
        conv(3, 8), nn.GroupNorm(4, 8, affine=False), nn.ReLU(), conv(8, 6),
        nn.BatchNorm2d(6, affine=False), nn.ReLU(), conv(6, 3),
    ), image()  # fmt: skip


@pattern({"a.weight": 8, "b.weight": 6, "c.weight": 4})
def one_dimensional() -> Made:
    def forward(m: Run, x: Tensor) -> Tensor:
        x = F.leaky_relu(m.n(m.a(x)))
        x = F.max_pool1d(F.prelu(m.b(x), m.slope), 2)
        return m.head(F.interpolate(m.c(x).tanh(), scale_factor=2).mean(-1))

    return Run(forward, a=nn.Conv1d(3, 8, 3), n=nn.BatchNorm1d(8), b=nn.Conv1d(8, 6, 3),
               slope=nn.Parameter(torch.rand(6)), c=nn.Conv1d(6, 4, 1), head=nn.Linear(4, 3)), (
        torch.randn(2, 3, 20),
    )  # fmt: skip
