"""On every pattern: what training masked equals what is cut out of it, momentum and all."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lighten.compare_outputs import distance
from lighten.coupling import couple
from lighten.errors import ImpossibleBudget
from lighten.gradual_shrinking import GradualShrinking
from lighten.group_lasso import GroupLasso
from lighten.network import Network
from lighten.shrink import TOLERANCE
from patterns import PATTERNS


def loss(out: Any) -> torch.Tensor:
    parts = out if isinstance(out, tuple | list) else (out,)
    return sum((p.square().mean() for p in parts if p.is_floating_point()), torch.zeros(()))


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_masked_in_training_equals_cut(name: str) -> None:
    module, inputs = PATTERNS[name].make()
    couplings = couple(Network.of(module, inputs))
    if not couplings.free:
        pytest.skip("no axis of it can shrink")
    module = copy.deepcopy(module).train().requires_grad_(True)
    try:
        shrinking = GradualShrinking(
            module, inputs, "0.75 params", start=1, end=3, couplings=couplings
        )
    except ImpossibleBudget:
        pytest.skip("a quarter of its parameters cannot go")
    lasso = GroupLasso(module, couplings, strength=1e-3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    for n in range(1, 7):
        (loss(module(*inputs)) + lasso()).backward()
        optimizer.step()
        shrinking.step(n, optimizer)
        lasso.step(n, optimizer)
        optimizer.zero_grad()
    found = shrinking.finish()
    assert found.cost <= 0.75 * shrinking.whole
    with torch.no_grad():
        assert distance(found.network(*inputs), copy.deepcopy(module).eval()(*inputs)) < TOLERANCE
