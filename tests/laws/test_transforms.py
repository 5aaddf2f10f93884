"""Every transform leaves what a network computes unchanged, for any batch, and can run again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lighten.network import Network
from lighten.registry import transforms


class Residual(nn.Module):
    """Norms after convolutions, a sum with a skip, relu in place, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Sequential(
            nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
            nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.relu(x + self.body(x))
        return self.head(x.mean((2, 3)))


class Shared(nn.Module):
    """One convolution read twice, each time with another norm: nothing can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.conv(self.one(self.conv(x)).relu()))


def high(*layers: nn.Module) -> nn.Module:
    """Layers whose first has outputs far above 0, those of odd channels at least."""
    first = next(m for m in layers if isinstance(m, nn.Conv2d | nn.Linear))
    assert first.bias is not None
    nn.init.normal_(first.weight, 0, 0.1)
    with torch.no_grad():
        first.bias[1::2] = 20
    return nn.Sequential(*layers)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "shared": Shared,
    "bounded": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.Flatten(),
    ),
    "grouped": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=4), nn.BatchNorm2d(12), nn.LeakyReLU(0.1), nn.MaxPool2d(2),
        nn.Conv2d(12, 4, 1),
    ),
    "transposed": lambda: nn.Sequential(
        nn.ConvTranspose2d(3, 8, 2, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1),
    ),
    "linear": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(432, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4),
        nn.GELU(), nn.Linear(4, 3),
    ),
    "high": lambda: high(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4, bias=False), nn.ReLU(),
        nn.Conv2d(12, 4, 1),
    ),
    "high linear": lambda: high(nn.Linear(12, 8, bias=True), nn.ReLU(), nn.Linear(8, 4)),
    "high padded": lambda: high(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)),
    "high bounded": lambda: high(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 1)),
    "norm first": lambda: nn.Sequential(
        nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)
    ),
}  # fmt: skip


def make(name: str) -> Network:
    """A network with norms and channels as unlike as in a trained one."""
    torch.manual_seed(0)
    module = NETWORKS[name]()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d):
            assert m.running_mean is not None
            assert m.running_var is not None
            m.running_mean.normal_()
            m.running_var.uniform_(0.2, 3)
            if m.affine:
                nn.init.uniform_(m.weight, 0.05, 4)
                nn.init.normal_(m.bias)
    return Network.of(module, torch.randn(1, 3, 12, 12))


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize("kind", sorted(NETWORKS))
@pytest.mark.parametrize("name", sorted(transforms))
def test_outputs_are_unchanged(name: str, kind: str, with_data: bool) -> None:
    network = make(kind)
    before = {k: t.clone() for k, t in network.module.state_dict().items()}
    data = torch.randn(7, 3, 12, 12) if with_data else None
    changed = transforms[name](network, data)
    other = 3 * torch.randn(5, 3, 12, 12)  # images that the transform has not seen, any batch
    expected = network(other)
    assert torch.allclose(changed(other), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    assert torch.equal(changed.flexible(other), changed(other))
    state = network.module.state_dict()
    assert all(torch.equal(t, state[k]) for k, t in before.items()), "the given network stays"
    again = transforms[name](changed, data)
    assert torch.allclose(again(other), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize(
    ("kind", "left"),
    [("residual", 0), ("bounded", 0), ("grouped", 0), ("transposed", 0), ("linear", 0),
     ("shared", 2), ("norm first", 2)],
)  # fmt: skip
def test_norms_are_folded_where_they_can_be(kind: str, left: int) -> None:
    folded = transforms["fold_batchnorm"](make(kind))
    norms = [n for n in folded.graph.graph.nodes if "batch_norm" in str(n.target)]
    assert len(norms) == left


def test_channels_become_more_alike() -> None:
    folded = transforms["fold_batchnorm"](make("residual"))
    data = torch.randn(16, 3, 12, 12)

    def spread(network: Network) -> float:
        values = network.flexible
        found: list[Tensor] = []
        from lighten.walk import operator, walk

        def see(node: object, value: object) -> object:
            if operator(node) == "conv2d":  # type: ignore[arg-type]
                found.append(value.abs().amax((0, 2, 3)).log().std())  # type: ignore[union-attr]
            return value

        walk(values, (data,), see)  # type: ignore[arg-type]
        return float(torch.stack(found).mean())

    assert spread(transforms["equalize"](folded, data)) < 0.9 * spread(folded)


@pytest.mark.parametrize(
    ("kind", "moved"),
    [("high", 4), ("high linear", 4), ("high padded", 0), ("high bounded", 0), ("residual", 0)],
)
def test_high_biases_are_absorbed_where_that_is_exact(kind: str, moved: int) -> None:
    network = make(kind)
    data = torch.randn(16, 3, 12, 12)
    absorbed = transforms["absorb_bias"](network, data)
    first = network.layers[0].name.replace("weight", "bias")
    before = network.module.state_dict().get(first, torch.zeros(8))
    lower = before - absorbed.module.state_dict().get(first, torch.zeros(8))
    assert int((lower > 5).sum()) == moved
    assert bool((lower[::2] == 0).all())
    plain = transforms["absorb_bias"](network).module.state_dict()
    assert torch.equal(plain.get(first, before), before), "nothing is known without data"
    if not moved:
        assert absorbed.module.state_dict().keys() == plain.keys(), "no biases of 0"
