"""A penalty that drives whole coupled groups of weights to zero before they are cut.

    lasso = GroupLasso(module, couplings, strength=1e-3)
    loss = cross_entropy(module(x), y) + lasso()        # its gradient shrinks groups, or
    lasso.step(n, optimizer)                            # its proximal step sets them to zero
    small = shrink(Network.of(module, x), couplings, lasso.keep())

A group is all that writes, carries or reads one unit of an axis, w_u; the penalty is

    λ Σ_u γ_u √|w_u| ‖w_u‖₂,    γ_u = 2^(α (max s - s_u) / (max s - min s)),   s_u = ‖w_u‖₂

s over the units of one axis: what is small already is pressed most. With α = 0 it is plain.

*Source:* Yuan & Lin 2006, "Model selection and estimation in regression with grouped variables",
equation 2.1 (the penalty); Parikh & Boyd 2014, "Proximal algorithms", section 6.5.1 (the step);
Fang et al. 2023, "DepGraph: towards any structural pruning", section 3.3 (γ); Wang et al. 2021,
"Neural pruning via growing regularization", algorithm 1 (λ that grows).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lighten.coupling import Couplings, Keep
from lighten.errors import WrongUse
from lighten.schedules import Optimizers, same_request
from lighten.types import Axis


class GroupLasso:
    """Calling it gives the penalty, a scalar; `step` takes its proximal step instead.

    proximal: False where the penalty is part of the loss, then `step` only lets λ grow.
    strength: λ. growth: added to λ every `every` steps, up to `most`. contrast: α. staying: axis ->
    units that stay, of those axes only the others are pressed, all alike, and other axes not at
    all. Raises WrongUse where there is nothing to press.
    """

    def __init__(
        self,
        module: nn.Module,
        couplings: Couplings,
        *,
        strength: float,
        growth: float = 0.0,
        every: int = 1,
        most: float = math.inf,
        contrast: float = 4.0,
        proximal: bool = True,
        staying: Keep | None = None,
    ) -> None:
        if not (strength >= 0 and growth >= 0 and strength + growth > 0 and contrast >= 0):
            raise WrongUse(
                f"strength={strength:g}, growth={growth:g}, contrast={contrast:g}",
                "none is below zero, and strength or growth is above",
            )
        if every < 1:
            raise WrongUse(f"growth every {every} steps cannot be", "at least 1")
        if staying is not None:
            couplings.check(staying)
        self.couplings, self.staying = couplings, staying
        self.strength, self.growth, self.every, self.most = strength, growth, every, most
        self.contrast, self.proximal, self.last = contrast, proximal, 0
        self.tensors = dict(module.named_parameters())
        self.axes = [a for a in couplings.free if staying is None or a.name in staying]
        if not self.axes:
            raise WrongUse("no axis is free to shrink", "lighten.inspect says why")
        strange = {m.parameter for a in self.axes for m in a.members} - (
            self.tensors.keys() | dict(module.named_buffers()).keys()
        )
        if strange:
            raise WrongUse(
                f"`{min(strange)}` is no parameter of {type(module).__name__}",
                "the couplings are those of another network",
            )

    @property
    def weight(self) -> float:
        """λ as it is now."""
        return min(self.strength + self.growth * (self.last // self.every), self.most)

    def __call__(self) -> Tensor:
        """λ Σ γ √size ‖w‖; its gradient at a group of zeros is zero."""
        total = torch.zeros((), device=next(iter(self.tensors.values())).device)
        for axis in self.axes:
            square, size = self._squares(axis)
            norm = torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
            total = total + (self._pressure(axis, norm.detach(), size) * norm).sum()
        return self.weight * total

    @torch.no_grad()
    def step(self, step: int, optimizer: Optimizers = None) -> None:
        """λ grows; with an optimizer, w_u ← w_u max(0, 1 - rate λ γ_u √|w_u| / ‖w_u‖) too.

        rate: the learning rate that the optimizer has for this weight; what it does not move stays.
        Groups of different axes share weights: axes are stepped one after the other. Raises
        WrongUse for a step backwards.
        """
        if step < self.last:
            raise WrongUse(f"step {step} comes after step {self.last}", "count over all epochs")
        fresh, self.last = step > self.last, step
        if self.proximal and optimizer is not None and fresh:
            given = optimizer if isinstance(optimizer, Iterable) else (optimizer,)
            groups = [group for o in given for group in o.param_groups]
            rates = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
            self.press({n: rates[id(p)] for n, p in self.tensors.items() if id(p) in rates})

    @torch.no_grad()
    def press(self, rate: float | Mapping[str, float]) -> None:
        """One proximal step. rate: of learning, for all weights or by their names."""
        for axis in self.axes:
            square, size = self._squares(axis)
            norm = square.sqrt()
            press = self.weight * self._pressure(axis, norm, size) / norm.clamp(min=1e-30)
            for m in axis.members:
                weight = self.tensors.get(m.parameter)
                own = rate.get(m.parameter) if isinstance(rate, Mapping) else rate
                if weight is None or own is None:
                    continue
                left = (1 - own * press).clamp(min=0)
                factor = torch.ones(weight.shape[m.dim], device=weight.device, dtype=weight.dtype)
                index = m.index.to(weight.device)
                factor[index] = left[:, None].expand_as(index).to(weight)
                weight.mul_(factor.view([-1 if d == m.dim else 1 for d in range(weight.dim())]))

    def norms(self) -> dict[str, Tensor]:
        """Axis -> (width,) ‖w_u‖₂."""
        return {a.name: self._squares(a)[0].detach().sqrt() for a in self.axes}

    def keep(self, tolerance: float = 0.0) -> dict[str, Tensor]:
        """Axis -> units whose norm is above `tolerance` of the largest, for lighten.shrink.

        At least one unit of each axis stays.
        """
        found = {}
        for name, norm in self.norms().items():
            stays = norm > tolerance * norm.max()
            stays[norm.argmax()] = True
            if not bool(stays.all()):
                found[name] = stays.nonzero().flatten().cpu()
        return found

    def _squares(self, axis: Axis) -> tuple[Tensor, int]:
        """(width,) ‖w_u‖² of an axis's units, and |w_u|."""
        total: Tensor | None = None
        size = 0
        for m in axis.members:
            weight = self.tensors.get(m.parameter)
            if weight is None:  # a buffer: nothing trains it
                continue
            others = [d for d in range(weight.dim()) if d != m.dim]
            square = weight.float().square()
            square = square.sum(others) if others else square
            own = square[m.index.to(weight.device)].sum(1)
            total = own if total is None else total + own.to(total.device)
            size += weight.numel() // weight.shape[m.dim] * m.index.shape[1]
        if total is None:
            raise WrongUse(f"axis `{axis.name}` has no parameter that trains")
        return total, size

    def _pressure(self, axis: Axis, norm: Tensor, size: int) -> Tensor:
        """(width,) γ √size of each unit."""
        if self.staying is not None:
            press = torch.ones_like(norm)
            press[self.staying[axis.name].to(norm.device)] = 0
            return press * math.sqrt(size)
        span = (norm.max() - norm.min()).clamp(min=1e-30)
        return torch.exp2(self.contrast * (norm.max() - norm) / span) * math.sqrt(size)

    # -- checkpoints
    def _request(self) -> dict[str, Any]:
        return {
            "strength": self.strength, "growth": self.growth, "every": self.every,
            "most": self.most, "contrast": self.contrast, "proximal": self.proximal,
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"request": self._request(), "step": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        same_request("GroupLasso", state["request"], self._request())
        self.last = int(state["step"])
