"""Muon: orthogonal steps of a known length, vectors by AdamW, and a loss that falls faster."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lighten.muon import Muon, orthogonal
from lighten.optimizers import make_optimizer


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(8, 8), (5, 20), (20, 5), (1, 7)])
def test_orthogonal_has_the_singular_vectors_of_the_matrix_and_values_near_one(
    shape: tuple[int, int],
) -> None:
    matrix = random(*shape)
    found = orthogonal(matrix)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    values = (u.T @ found @ v.T).diagonal()
    assert found.shape == matrix.shape
    large = s > 0.05 * matrix.norm()
    assert bool(((values > 0.6) & (values < 1.3))[large].all())
    assert float(u.T.matmul(found).matmul(v.T).fill_diagonal_(0).abs().max()) < 1e-4


def test_zeros_stay_zeros() -> None:
    assert not orthogonal(torch.zeros(3, 4)).any()


def test_a_step_of_a_weight_is_the_rate_in_shares_of_its_length() -> None:
    for weight in (random(6, 3, 3, 3), 1e-3 * random(4, 9)):
        before, learned = weight.clone(), nn.Parameter(weight)
        learned.grad = 100 * random(*weight.shape, seed=1)
        Muon([{"params": [learned]}], lr=0.01).step()
        moved = (learned.detach() - before).norm() / before.norm()
        torch.testing.assert_close(moved, torch.tensor(0.01))


def test_vectors_move_as_adamw_moves_them() -> None:
    a, b = (nn.Parameter(random(5)) for _ in range(2))
    ours = Muon([{"params": [a]}], lr=0.01)
    theirs = torch.optim.AdamW([b], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(5):
        a.grad = b.grad = random(5, seed=step)
        ours.step()
        theirs.step()
    torch.testing.assert_close(a, b)


def test_a_weight_of_zeros_moves_and_one_without_a_gradient_does_not() -> None:
    zeros, still = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(random(3, 4))
    before = still.clone()
    zeros.grad = random(3, 4)
    Muon([{"params": [zeros, still]}], lr=0.01).step()
    assert zeros.isfinite().all()
    assert zeros.any()
    assert torch.equal(still, before)


def test_its_state_goes_on_where_it_was_kept() -> None:
    """As checkpoints keep it: loaded into another optimizer, the next step is the same."""
    ends = []
    for kept in (False, True):
        module = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
        module.load_state_dict({k: random(*v.shape) for k, v in module.state_dict().items()})
        optimizer = make_optimizer("muon", module.named_parameters())
        for step in range(4):
            for group in optimizer.param_groups:
                group["lr"] = 0.01
            for p in module.parameters():
                p.grad = random(*p.shape, seed=step)
            optimizer.step()
            if kept and step == 1:
                state = optimizer.state_dict()
                optimizer = make_optimizer("muon", module.named_parameters())
                optimizer.load_state_dict(state)
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*ends)


def test_an_ill_conditioned_regression_is_learned_in_steps_that_sgd_needs_more_of() -> None:
    """What it is for: directions of small gradients are learned as fast as the large ones."""
    inputs = random(256, 16) * torch.logspace(0, -2, 16)
    target = inputs @ random(16, 8, seed=1)
    losses = {}
    for kind, rate in (("sgd", 0.05), ("muon", 0.05)):
        layer = nn.Linear(16, 8, bias=False)
        layer.load_state_dict({"weight": random(8, 16, seed=2)})
        optimizer = make_optimizer(kind, layer.named_parameters(), decay=0.0)
        for step in range(100):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / 100)
            optimizer.zero_grad()
            (layer(inputs) - target).square().mean().backward()
            optimizer.step()
        losses[kind] = float((layer.weight.detach() - random(16, 8, seed=1).T).square().mean())
    assert losses["muon"] < 0.5 * losses["sgd"]
