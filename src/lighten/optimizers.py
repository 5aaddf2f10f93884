"""What moves the weights: SGD with momentum, AdamW or Muon; norms and biases do not decay.

*Source:* Sutskever et al. 2013 (Nesterov momentum); Loshchilov & Hutter 2019, "Decoupled weight
decay regularization" (AdamW); Goyal et al. 2017, section 5.1 (no decay of norms and biases).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from lighten.errors import WrongUse
from lighten.muon import Muon

Grouped = Callable[[str, nn.Parameter], tuple[float, float]]
"""(name, parameter) -> (its rate over the rate, its weight decay over the weight decay)."""

MOMENTUM = 0.9
DECAY = {"sgd": 5e-4, "adamw": 1e-2, "muon": 0.0}
"""Optimizer -> its usual weight decay."""

RATE = {"sgd": 0.05, "adamw": 1e-3, "muon": 3e-3}
"""Optimizer -> its usual rate, of networks that were trained before."""


def grouped(name: str, parameter: nn.Parameter) -> tuple[float, float]:
    """Weights decay; vectors and scalars (norms, biases, scales) do not."""
    return 1.0, 1.0 if parameter.ndim > 1 else 0.0


def usual_rate(kind: str) -> float:
    """RATE; raises WrongUse for an unknown kind."""
    _known(kind)
    return RATE[kind]


def _known(kind: str) -> None:
    if kind not in DECAY:
        raise WrongUse(f"optimizer `{kind}` is not known", f"known: {', '.join(DECAY)}")


def make_optimizer(
    kind: str,
    parameters: Iterable[tuple[str, nn.Parameter]],
    decay: float | None = None,
    group: Grouped = grouped,
) -> torch.optim.Optimizer:
    """The optimizer of these named parameters; each group has a `factor` of the rate.

    Raises WrongUse for an unknown kind and where there is nothing to train.
    """
    _known(kind)
    decay = DECAY[kind] if decay is None else decay
    # shares (FSDP) and whole parameters apart: fused steps take one kind at a time
    groups: dict[tuple[float, float, type], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        groups.setdefault((*group(name, parameter), type(parameter)), []).append(parameter)
    if not groups:
        raise WrongUse("the student has nothing to train", "requires_grad is off everywhere")
    options = [
        {"params": members, "factor": factor, "weight_decay": decay * share, "lr": 0.0}
        for (factor, share, _), members in groups.items()
    ]
    if kind == "sgd":
        return torch.optim.SGD(options, lr=0.0, momentum=MOMENTUM, nesterov=True)
    if kind == "muon":
        return Muon(options)
    members = [p for group in options for p in group["params"]]  # type: ignore[attr-defined]
    fused = all(type(p) is nn.Parameter and p.device.type in ("cpu", "cuda") for p in members)
    return torch.optim.AdamW(options, lr=0.0, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step, times each group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
