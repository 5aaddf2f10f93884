"""Students that are drawn anew: every layer as it draws itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lighten.network import Network
from lighten.students import StudentSpec, from_scratch, make_student


class Attentive(nn.Module):
    """Layers of torch's own; attention has only a `_reset_parameters`."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).mean(1))
        return out


X = torch.randn(40, 5, 8, generator=torch.Generator().manual_seed(0))


def attentive() -> Network:
    torch.manual_seed(0)
    found = Network.of(Attentive(), X[:2])
    with torch.no_grad():
        for parameter in found.module.parameters():
            parameter.add_(1.0)
    return found


def test_half_the_depth_of_a_transformer_is_drawn_anew() -> None:
    teacher = attentive()
    made = make_student(teacher, StudentSpec.parse("half depth, from scratch"), X)
    assert made.blocks == {"body.layers": [0, 3]}
    assert made.network(X).shape == (40, 3)


def test_attention_begins_as_torch_begins_it() -> None:
    """Projections within the bounds of Xavier, all its biases zero, those of its parts too."""
    for part in from_scratch(attentive()).module.modules():
        if isinstance(part, nn.MultiheadAttention):
            assert part.in_proj_weight is not None
            assert 0.3 < float(part.in_proj_weight.abs().max()) <= (6 / (24 + 8)) ** 0.5
            assert not bool(part.in_proj_bias.any())
            assert not bool(part.out_proj.bias.any())


def test_the_same_seed_draws_the_same_student() -> None:
    one, two, other = (from_scratch(attentive(), seed) for seed in (1, 1, 2))
    assert one.digest == two.digest != other.digest
