"""torch-pruning on the same network: L1 importance, the ratio bisected to the same MACs.

pip install torch-pruning

Only the first convolution of each block is given to it: where it narrows the residual streams too,
the zero channels of the option-A shortcuts keep their number and the network no longer runs.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn


def prune(model: nn.Module, limit: float, iterative: int = 1) -> nn.Module:
    """The least pruned copy of `model` at or below `limit` MACs."""
    low, high, best = 0.0, 1.0, None
    for _ in range(12):
        ratio = (low + high) / 2
        made = _at(model, ratio, iterative)
        if count(made) <= limit:
            best, high = made, ratio
        else:
            low = ratio
    if best is None:
        raise SystemExit(f"torch-pruning does not reach {limit:,.0f} MACs")
    return best


def _at(model: nn.Module, ratio: float, iterative: int) -> nn.Module:
    import torch_pruning as tp

    made = copy.deepcopy(model)
    inputs = torch.zeros(1, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            made,
            inputs,
            importance=tp.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=ratio,
            iterative_steps=iterative,
            ignored_layers=[
                module
                for name, module in made.named_modules()
                if name in ("conv1", "linear") or name.endswith(".conv2")
            ],
        )
        for _ in range(iterative):
            pruner.step()
    return made


@torch.no_grad()
def count(model: nn.Module) -> float:
    """MACs of one image: of convolutions and the classifier, as lighten counts them."""
    total = 0

    def add(module: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal total
        total += module.weight[0].numel() * out.numel()

    kinds = (nn.Conv2d, nn.Linear)
    handles = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, kinds)]
    model(torch.zeros(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    return total


@torch.no_grad()
def reestimate(model: nn.Module, images: torch.Tensor, batch: int = 256) -> nn.Module:
    """Batch norms' means and variances from the pruned network's own activations."""
    made = copy.deepcopy(model)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain average of all batches
    made.train()
    for start in range(0, len(images), batch):
        made(images[start : start + batch])
    return made.eval()
