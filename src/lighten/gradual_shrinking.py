"""Channels and heads that go while a network trains, coupled ones together, cut at the end.

    shrinking = GradualShrinking(module, example, budget="0.5 macs", start=100, end=1000, every=100)
    for n in range(1, steps + 1):
        loss(module).backward()
        optimizer.step()
        shrinking.step(n, optimizer)
        optimizer.zero_grad()
    small = shrinking.finish()          # lighten.Pruned: equal to the masked network, smaller

The cost follows the schedule down to the budget. Until the end nothing is cut: whatever writes,
carries or reads a removed unit is zero and stays so, so optimizers and checkpoints keep their
shapes. What is gone does not come back.

*Source:* Zhu & Gupta 2017 for the schedule; He et al. 2018, "Soft filter pruning for accelerating
deep convolutional neural networks", for filters zeroed during training (there they come back).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lighten import network_cost
from lighten.coupling import Couplings, couple
from lighten.errors import ImpossibleBudget, WrongUse
from lighten.masked import Zeroed, stored, zero_, zeroed
from lighten.network import Network
from lighten.prune import GROUP_OBS, Pruned, check_criterion, rank
from lighten.schedules import Clock, Optimizers, Schedule, put_back, same_request
from lighten.shrink import shrink
from lighten.structure import free, narrow
from lighten.types import Budget
from lighten.weight_masks import momenta
from lighten.widths import Curve, keep_of, spend


class GradualShrinking:
    """Widths of a module led down to a budget; `step` after every optimizer step.

    example_inputs: as the module takes them, a batch of 2. budget: "0.5 macs", "2M params". start,
    end, every: as in GradualPruning. criterion: of `lighten list criteria`, summed over each unit;
    "group_obs" and those that look at inputs or gradients need data (count, ...). couplings: of
    lighten.coupling.couple, if at hand. multiple: of which widths are multiples. Raises UserError.
    """

    def __init__(
        self,
        module: nn.Module,
        example_inputs: Any,
        budget: str,
        *,
        end: int,
        start: int = 0,
        every: int = 1,
        schedule: str = "cubic",
        criterion: str = "l2",
        data: Tensor | None = None,
        couplings: Couplings | None = None,
        multiple: int = 1,
    ) -> None:
        limit = Budget.parse(budget)
        if limit.unit not in ("macs", "params"):
            raise WrongUse(
                f"training shrinks to a budget of MACs or parameters, not of {limit.unit}",
                'write "0.5 macs" or "2M params"',
            )
        if multiple < 1:
            raise WrongUse(f"widths in multiples of {multiple} cannot be", "at least 1")
        check_criterion(criterion)
        if criterion == GROUP_OBS and data is None:
            raise WrongUse(f"{criterion} needs data", "pass data=..., or criterion='l2'")
        self.module, self.budget = module, budget
        self.criterion, self.data, self.multiple = criterion, data, multiple
        self.copy = Network.of(module, example_inputs)  # traced once, its weights set at updates
        self.couplings = couple(self.copy) if couplings is None else couplings
        if not self.couplings.free:
            raise WrongUse(
                f"{self.copy.source} has no channels that can go",
                "lighten.inspect says why; GradualPruning makes its weights sparse",
            )
        self.keep: dict[str, Tensor] = {}
        self.where: Zeroed = {}
        curves = self._curves()
        self.axes = free(self.couplings.axes, curves)
        self.spent = network_cost.counted(self.copy, self.axes, limit.unit)
        self.whole = self.spent.actual(self.copy)
        self.room = min(limit.amount(self.whole), self.whole)
        try:  # what no width meets is said now, not after the training
            self._choose(curves, self.room)
        except ImpossibleBudget as error:
            raise ImpossibleBudget(
                f"budget {budget}: {error.message}", error.hint, error.least
            ) from error
        self.clock = Clock(Schedule(1 - self.room / self.whole, start, end, every, schedule))

    @property
    def done(self) -> bool:
        """Whether the last update was made: no state before that is as small as was asked."""
        return self.clock.done == self.clock.schedule.updates

    @property
    def widths(self) -> dict[str, int]:
        """Axis -> units that are left, of every axis that can shrink."""
        return {a.name: len(self.keep.get(a.name, range(a.width))) for a in self.axes}

    @property
    def cost(self) -> float:
        """Predicted cost of what is left, in the budget's unit."""
        return self.spent.predicted(self.widths)

    @torch.no_grad()
    def step(self, step: int, optimizer: Optimizers = None) -> None:
        """Choose which units go where the schedule says so, and set to zero what has gone.

        step: optimizer steps so far. optimizer: whose momentum is masked too. Raises WrongUse for a
        step backwards.
        """
        if self.clock.tick(step):
            self._update()
        self._mask(optimizer)

    def __call__(self, step: int, steps: int) -> None:
        """As a hook of a training loop."""
        self.step(step)

    @torch.no_grad()
    def finish(self) -> Pruned:
        """A smaller copy of the module, checked to equal the masked one; in evaluation mode, its
        parameters frozen. Raises WrongUse before the last update, and where what is masked is not
        zero (an earlier state was put back)."""
        self.clock.finished()
        own = dict(self.module.named_parameters())
        for name, dims in self.where.items():
            for dim, gone in dims.items():
                if name in own:
                    put_back(name, own[name].index_select(dim, gone.to(own[name].device)))
        self._mask(None)  # running statistics, which move between steps
        self._look()
        small = shrink(self.copy, self.couplings, self.keep) if self.keep else self.copy
        return Pruned(small, self.couplings, dict(self.keep), self.spent.actual(small))

    # -- checkpoints
    def _request(self) -> dict[str, Any]:
        s = self.clock.schedule
        return {
            "budget": self.budget, "start": s.start, "end": s.end, "every": s.every,
            "schedule": s.shape, "criterion": self.criterion, "multiple": self.multiple,
            "widths": {a.name: a.width for a in self.axes},
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs to shrink as this one would have."""
        return {
            "request": self._request(),
            "step": self.clock.step,
            "done": self.clock.done,
            "keep": dict(self.keep),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; weights are the module's own business."""
        same_request("GradualShrinking", state["request"], self._request())
        self.clock.step, self.clock.done = int(state["step"]), int(state["done"])
        self.keep = dict(state["keep"])
        self.where = zeroed(self.couplings, self.keep)

    # -- updates
    def _look(self) -> None:
        """Take over the weights as they are now."""
        self.copy.module.load_state_dict(self.module.state_dict())

    def _curves(self) -> dict[str, Curve]:
        """Axis -> the order in which units go, those that are gone first, at no loss."""
        found = rank(self.copy, self.couplings, self.data, self.criterion)
        for name, kept in self.keep.items():
            order, error = found[name].order, found[name].error.clone()
            stays = torch.isin(order, kept)
            error[len(kept) :] = 0
            found[name] = Curve(torch.cat([order[~stays], order[stays]]), error)
        return found

    def _choose(self, curves: Mapping[str, Curve], limit: float) -> dict[str, int]:
        """Axis -> width, no axis wider than it is."""
        cost = self.spent
        way = partial(spend, self.axes, curves, cost.terms, fixed=cost.fixed)
        now = self.widths
        found = way(limit=limit, multiple=self.multiple)
        return {name: min(width, now[name]) for name, width in found.items()}

    def _update(self) -> None:
        self._look()
        curves = self._curves()
        schedule = self.clock.schedule
        if self.clock.done == schedule.updates:  # the real cost counts now
            choose = partial(self._choose, curves)
            last = narrow(self.copy, self.couplings, curves, self.spent, self.room, choose)
            self.keep = dict(last.keep)
        else:
            limit = self.whole * (1 - schedule.at(self.clock.step))
            self.keep = keep_of(curves, self._choose(curves, limit))
        self.where = zeroed(self.couplings, self.keep)

    def _mask(self, optimizer: Optimizers) -> None:
        tensors = stored(self.module)
        zero_(tensors, self.where)
        for name, dims in self.where.items():
            for part in momenta(optimizer, tensors[name]):
                zero_({name: part}, {name: dims})
