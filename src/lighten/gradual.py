"""Sparse weights while a network trains: a little more goes every few steps.

    pruning = GradualPruning(module, "0.9", start=100, end=1000, every=50)
    for n in range(1, steps + 1):
        loss(module).backward()
        optimizer.step()
        pruning.step(n, optimizer)      # before zero_grad: some criteria look at gradients
        optimizer.zero_grad()
    pruning.finish()                    # the module itself, with zeros
    pruning.compressed()                # its sparse weights, as exporters take them

At each update all weights are judged again, those that are masked by the value they had when they
were: what turns out to be needed grows again.

*Source:* Zhu & Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model
compression", section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lighten.errors import WrongUse
from lighten.registry import criteria
from lighten.schedules import Clock, Optimizers, Schedule, put_back, same_request
from lighten.sparse import Above, OfEach, Share, Sparse, nearest, pattern_of
from lighten.types import Compressed, Spec, Stats
from lighten.weight_masks import WeightMasks, chosen

DECAY = 0.9
"""Of the running means of gradients, for criteria that look at them."""

SCOPES = ("layer", "global")


class GradualPruning:
    """Weights of a module made sparse on a schedule; `step` after every optimizer step.

    sparsity: "0.9" (that share goes) or "2:4" (2 of 4 in a row stay). start, end: first and last
    update, in optimizer steps; every: steps between. criterion: a name of `lighten list criteria`
    that judges single weights. scope: each weight its share ("layer"), or all compete ("global").
    regrow: False keeps what is gone gone. names: parameters; all of linear layers and convolutions
    without. stats: called at each update for criteria that need Hessians (lighten.moments.hessians
    gives them); gradients are seen in `step`. Raises WrongUse, UnknownName.
    """

    def __init__(
        self,
        module: nn.Module,
        sparsity: str,
        *,
        end: int,
        start: int = 0,
        every: int = 1,
        schedule: str = "cubic",
        criterion: str = "l1",
        scope: str = "layer",
        regrow: bool = True,
        names: Iterable[str] | None = None,
        stats: Callable[[], Mapping[str, Stats]] | None = None,
    ) -> None:
        self.pattern = _pattern(sparsity)
        if scope not in SCOPES:
            raise WrongUse(f"scope `{scope}` cannot be", f"one of: {', '.join(SCOPES)}")
        weights = chosen(module, names)
        for name, weight in weights.items():
            why = self.pattern.accepts((weight.shape[0], weight[0].numel()))
            if why is not None:
                fit = [n for n, w in weights.items() if _fits(self.pattern, w)]
                raise WrongUse(f"`{name}` cannot be {sparsity}: {why}", f"names={fit}")
        self.module, self.sparsity = module, sparsity
        self.criterion, self.scope, self.regrow = criterion, scope, regrow
        self.gradients = _needs_gradients(criterion, stats is not None)
        self.stats = stats
        last = 1 - self.pattern.n / self.pattern.m if isinstance(self.pattern, OfEach) else (
            self.pattern.share
        )  # fmt: skip
        self.clock = Clock(Schedule(last, start, end, every, schedule))
        whole = {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()}
        self.held = WeightMasks(module, whole)
        self.gone: dict[str, Tensor] = {}  # what masked weights were, in the order of the mask
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}  # running mean of g and of g²

    @property
    def masks(self) -> dict[str, Tensor]:
        """Weight's name -> bool of its shape, True where it stays."""
        return self.held.masks

    @property
    def done(self) -> bool:
        """Whether the last update was made: no state before that is as sparse as was asked."""
        return self.clock.done == self.clock.schedule.updates

    @property
    def share(self) -> float:
        """The share of weights that is gone."""
        sizes = [(m.numel(), int(m.count_nonzero())) for m in self.masks.values()]
        return 1 - sum(k for _, k in sizes) / sum(n for n, _ in sizes)

    @torch.no_grad()
    def step(self, step: int, optimizer: Optimizers = None) -> None:
        """Update the masks where the schedule says so, and set to zero what they do not keep.

        step: optimizer steps so far. optimizer: whose momentum is masked too. Raises WrongUse for a
        step backwards, BadInput for NaN.
        """
        fresh = step > self.clock.step
        due = self.clock.tick(step)
        if self.gradients and fresh:
            self._see()
        if due:
            self._update(self.clock.schedule.at(step))
        self.held.step(step, optimizer)

    def __call__(self, step: int, steps: int) -> None:
        """As a hook of a training loop."""
        self.step(step)

    def finish(self) -> nn.Module:
        """The module, with zeros; raises WrongUse before the last update, and where masked weights
        are not zero (an earlier state was put back)."""
        self.clock.finished()
        for name, weight in self.held.weights.items():
            put_back(name, weight.detach()[~self.masks[name].to(weight.device)])
        self.gone, self.seen = {}, {}
        return self.module

    def compressed(self, format: str = "f32") -> dict[str, Compressed]:
        """Weight's name -> the sparse weight (out, in) as it is now, in a format of numbers."""
        found = {}
        for name, weight in self.held.weights.items():
            kept = self.masks[name].flatten(1).to(weight.device)
            text = self.sparsity
            if isinstance(self.pattern, Share):  # of a global share each weight has its own
                gone = 1 - float(kept.double().mean())
                text = f"{min(max(gone, 1e-6), 1 - 1e-6):.6f}"
            spec = Spec(format, text, solver="magnitude")
            matrix = weight.detach().flatten(1).float()
            found[name] = nearest(matrix, kept, Sparse.of(spec), None, spec)
        return found

    # -- checkpoints
    def _request(self) -> dict[str, Any]:
        s = self.clock.schedule
        return {
            "sparsity": self.sparsity, "start": s.start, "end": s.end, "every": s.every,
            "schedule": s.shape, "criterion": self.criterion, "scope": self.scope,
            "regrow": self.regrow, "names": list(self.masks),
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs to prune as this one would have."""
        return {
            "request": self._request(),
            "step": self.clock.step,
            "done": self.clock.done,
            "gone": {name: values.cpu() for name, values in self.gone.items()},
            "seen": {name: [g.cpu(), s.cpu()] for name, (g, s) in self.seen.items()},
            **self.held.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; weights are the module's own business."""
        same_request("GradualPruning", state["request"], self._request())
        self.clock.step, self.clock.done = int(state["step"]), int(state["done"])
        self.held.load_state_dict(state)
        self.gone = dict(state["gone"])
        self.seen = {name: (g, s) for name, (g, s) in state["seen"].items()}

    # -- updates
    def _see(self) -> None:
        for name, weight in self.held.weights.items():
            if weight.grad is None:
                continue
            g = weight.grad.detach().float()
            if not bool(torch.isfinite(g).all()):  # a step that a scaler of float16 passes over
                continue
            mean, square = self.seen.get(name, (g, g.square()))
            self.seen[name] = (
                mean.to(g.device).lerp(g, 1 - DECAY),
                square.to(g.device).lerp(g.square(), 1 - DECAY),
            )

    def _update(self, share: float) -> None:
        stats = self.stats() if self.stats is not None else {}
        dense: dict[str, Tensor] = {}
        scores: dict[str, Tensor] = {}
        for name, weight in self.held.weights.items():
            mask = self.masks[name].to(weight.device)
            full = weight.detach().clone()
            if self.regrow and name in self.gone:
                full[~mask] = self.gone[name].to(full)
            dense[name] = full
            score = criteria[self.criterion](full.flatten(1).float(), self._stats(name, stats))
            scores[name] = score if self.regrow else score.masked_fill(~mask.flatten(1), -1)
        for name, stays in _stay(scores, share, self.pattern, self.scope == "global").items():
            weight = self.held.weights[name]
            mask = stays.view(weight.shape)
            weight.copy_(dense[name])  # what grows again has its value back
            self.gone[name] = dense[name][~mask]
            self.masks[name] = mask

    def _stats(self, name: str, given: Mapping[str, Stats]) -> Stats | None:
        if not self.gradients:
            return given.get(name)
        if name not in self.seen:
            raise WrongUse(
                f"`{name}` had no gradient when step {self.clock.step} was told",
                "call step before optimizer.zero_grad(), after backward()",
            )
        slope, curvature = (t.flatten(1) for t in self.seen[name])
        return Stats(self.clock.step, torch.empty(0), slope=slope, curvature=curvature)


def _pattern(sparsity: str) -> Share | OfEach:
    pattern = pattern_of(sparsity)
    if isinstance(pattern, Above):
        raise WrongUse(
            f"a threshold ({sparsity}) has no share that a schedule could lead to",
            'write "0.9" (the share that goes) or "2:4" (2 of 4 stay)',
        )
    return pattern


def _fits(pattern: Share | OfEach, weight: Tensor) -> bool:
    return pattern.accepts((weight.shape[0], weight[0].numel())) is None


def _needs_gradients(criterion: str, has_stats: bool) -> bool:
    """Whether a criterion works on gradients; raises WrongUse where it needs what is not there."""
    judge = criteria[criterion]
    if getattr(judge, "outputs", False):
        raise WrongUse(
            f"criterion {criterion} judges whole outputs, not single weights",
            "lighten.gradual_shrinking removes whole channels; for weights try l1 or taylor1",
        )
    if has_stats:
        return False
    one = torch.ones(2, 2)
    for stats in (None, Stats(1, torch.empty(0), slope=one, curvature=one)):
        try:
            judge(one, stats)
        except WrongUse:
            continue
        return stats is not None
    raise WrongUse(
        f"criterion {criterion} needs statistics of the inputs",
        "pass stats=lambda: hessians(network, data), see lighten.moments; or l1, taylor1, taylor2",
    )


def _stay(
    scores: Mapping[str, Tensor], share: float, pattern: Share | OfEach, together: bool
) -> dict[str, Tensor]:
    """Name -> what stays of its weights (out, in) when exactly round(share * size) go.

    On the way to n of m, only what the pattern would drop may go: no group ever has fewer than n.
    """
    if isinstance(pattern, OfEach):
        scores = {n: s.masked_fill(pattern.choose(s), torch.inf) for n, s in scores.items()}
    choose = Share(share).choose
    if not together:
        return {name: choose(score) for name, score in scores.items()}
    home = next(iter(scores.values())).device
    flat = choose(torch.cat([s.reshape(-1).to(home) for s in scores.values()])[None])[0]
    parts = torch.split(flat, [s.numel() for s in scores.values()])
    return {
        name: part.view(score.shape).to(score.device)
        for part, (name, score) in zip(parts, scores.items(), strict=True)
    }
