"""Lottery tickets: the weights that survive pruning go back to what they were early in training.

    rewind = Rewind(module, at=100)
    ...                                  # rewind.step(n, optimizer) after every optimizer step
    held = rewind.restore(pruning.masks) # and train again: held.step(n, optimizer)

*Source:* Frankle et al. 2019, "Stabilizing the lottery ticket hypothesis", section 3 (rewinding to
iteration k).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lighten.errors import WrongUse
from lighten.schedules import Optimizers
from lighten.weight_masks import WeightMasks


class Rewind:
    """Keeps all parameters and buffers as they are after step `at`; at=0: as they are now."""

    def __init__(self, module: nn.Module, at: int = 0) -> None:
        if at < 0:
            raise WrongUse(f"there is no step {at} to go back to", "at least 0")
        self.module, self.at, self.last = module, at, 0
        self.early: dict[str, Tensor] = {}
        if at == 0:
            self._keep()

    def step(self, step: int, optimizer: Optimizers = None) -> None:
        """step: optimizer steps so far. Raises WrongUse where the step to keep was missed."""
        self.last = step
        if self.early or step < self.at:
            return
        if step > self.at:
            raise WrongUse(
                f"step {step} was told, step {self.at} never",
                "call step after every optimizer step, or load_state_dict first",
            )
        self._keep()

    def __call__(self, step: int, steps: int) -> None:
        """As a hook of a training loop."""
        self.step(step)

    @torch.no_grad()
    def restore(self, masks: Mapping[str, Tensor]) -> WeightMasks:
        """Everything as it was early, weights that `masks` do not keep zero, and held there.

        The optimizer and its learning rate start again too: that is the caller's. Raises WrongUse
        before step `at`.
        """
        if not self.early:
            raise WrongUse(
                f"training is at step {self.last}, weights are kept at step {self.at}",
                "train longer, or keep an earlier step",
            )
        own = self.module.state_dict()
        for name, value in self.early.items():
            own[name].copy_(value)
        return WeightMasks(self.module, masks)

    def _keep(self) -> None:
        self.early = {k: t.detach().clone() for k, t in self.module.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "last": self.last, "early": dict(self.early)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["at"] != self.at:
            raise WrongUse(
                f"this state keeps step {state['at']}, not {self.at}", f"Rewind(at={state['at']})"
            )
        self.last, self.early = int(state["last"]), dict(state["early"])
