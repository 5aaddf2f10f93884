"""Weights that stay zero while a network trains.

    held = WeightMasks.of_zeros(module)     # or WeightMasks(module, {name: mask})
    held.step(n, optimizer)                 # after each step of the optimizer

The module stays as it is: no wrapper, no parametrization, the same state dict. What the optimizer
made of a masked weight is set to zero again, and its momentum with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lighten.errors import WrongUse
from lighten.schedules import Optimizers

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

MOMENTUM = ("momentum_buffer", "exp_avg")
"""Parts of an optimizer's state that point somewhere. Mean squares stay: a weight that grows again
without its own would make a leap."""


def weights_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> weight of every linear layer and convolution, tied ones once.

    Where something parametrizes a weight (training-aware rounding does), it is what lies under it.
    """
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path, part in module.named_modules():
        if not isinstance(part, LAYERS):
            continue
        weight = part._parameters.get("weight")
        if weight is None and "parametrizations" in part._modules:
            weight = getattr(part.parametrizations.weight, "original", None)  # type: ignore[union-attr]
        if isinstance(weight, nn.Parameter) and id(weight) not in seen:
            seen.add(id(weight))
            found[f"{path}.weight" if path else "weight"] = weight
    return found


def chosen(module: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Parameter]:
    """The weights called so, or those of all layers; raises WrongUse where there are none."""
    layers = weights_of(module)
    if names is None:
        if not layers:
            raise WrongUse(
                f"{type(module).__name__} has no weight of a linear layer or a convolution",
                "pass the network that is trained, or names=[...] of its parameters",
            )
        return layers
    every = {**dict(module.named_parameters()), **layers}
    found = {}
    for name in names:
        weight = every.get(name)
        if weight is None or weight.dim() < 2 or not weight.is_floating_point():
            raise WrongUse(
                f"`{name}` is no weight of {type(module).__name__} that can be sparse",
                "names are those of named_parameters(), of two dimensions or more",
            )
        found[name] = weight
    if not found:
        raise WrongUse("names=[] leaves nothing to prune", "name a weight, or leave names out")
    return found


class WeightMasks:
    """Masks (True: it stays) held over the weights of a module; `step` sets the others to zero.

    masks: weight's name -> bool, of its shape. Raises WrongUse for names and shapes that are not
    the module's.
    """

    def __init__(self, module: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self.weights = chosen(module, list(masks))
        for name, mask in masks.items():
            if mask.dtype != torch.bool or mask.shape != self.weights[name].shape:
                raise WrongUse(
                    f"the mask of `{name}` is {mask.dtype} {tuple(mask.shape)}, the weight"
                    f" {tuple(self.weights[name].shape)}",
                    "a bool for every weight, True where it stays",
                )
        self.masks = dict(masks)
        self.step()

    @classmethod
    def of_zeros(cls, module: nn.Module) -> WeightMasks:
        """What is zero now stays zero."""
        return cls(module, {name: w.detach() != 0 for name, w in weights_of(module).items()})

    @torch.no_grad()
    def step(self, step: int = 0, optimizer: Optimizers = None) -> None:
        """Set masked weights to zero, and their momentum in the optimizer."""
        for name, mask in self.masks.items():
            weight = self.weights[name]
            if mask.device != weight.device:
                mask = self.masks[name] = mask.to(weight.device)
            weight.masked_fill_(~mask, 0)
            for part in momenta(optimizer, weight):
                part.masked_fill_(~mask.to(part.device), 0)

    def __call__(self, step: int, steps: int) -> None:
        """As a hook of a training loop."""
        self.step(step)

    def state_dict(self) -> dict[str, Any]:
        return {"masks": {name: mask.cpu() for name, mask in self.masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = state["masks"]
        if saved.keys() != self.masks.keys():
            raise WrongUse("these masks are of other weights", f"here: {', '.join(self.masks)}")
        self.masks = dict(saved)


def momenta(optimizer: Optimizers, weight: Tensor) -> Iterator[Tensor]:
    """The parts of optimizers' states that point where a weight goes, in its shape."""
    given = () if optimizer is None else optimizer
    for one in given if isinstance(given, Iterable) else (given,):
        own = one.state.get(weight, {})
        yield from (
            part
            for key, part in own.items()
            if key in MOMENTUM and isinstance(part, Tensor) and part.shape == weight.shape
        )
