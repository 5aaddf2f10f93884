"""Solve a smaller network's weights again towards the dense network, with no training.

Both networks run side by side on the same examples, node by node. When a weight W is reached, what
comes before it is solved already; its inputs X are those that the smaller network really has, its
target T what the dense network has at that place:

    W*, b* = argmin ‖T - (X Wᵀ + b)‖² + λ‖W - W₀‖²        (batch norm after it taken as part of W)

Where the outputs go into a sum, T is the dense sum less what the smaller network's other summand
is: so every block of a residual network mends what all blocks before it have lost. Where the result
goes through a ReLU, T is free below zero: it is put where the fit lies, and solved again.

*Source:* He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", section 3.2
(inputs of the pruned prefix; residual targets); Zhang et al. 2015, "Accelerating Very Deep
Convolutional Networks", section 3 (ReLU).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from lighten.coupling.axes import Couplings, Keep
from lighten.errors import WrongUse
from lighten.fit import Problem, fit
from lighten.moments import ROWS
from lighten.network import Network, weighted
from lighten.patches import Window
from lighten.stepwise import Steps, Values, steps_of
from lighten.tails import Norm, Tail, tail_of
from lighten.walk import operator


@torch.no_grad()
def compensate(
    dense: Network,
    small: Network,
    couplings: Couplings,
    keep: Keep,
    data: Tensor,
    *,
    rows: int = ROWS,
    batch: int = 64,
    ridge: float = 1e-4,
    rounds: int = 3,
    seed: int = 0,
    tick: Callable[[int], None] | None = None,
) -> Network:
    """A copy of `small` (`dense` without the units that `keep` leaves out), its weights and the
    biases of norms and layers solved again; names and shapes stay.

    data: (count, ...) inputs; both networks' activations of all of them are in memory, from where
    they are made to where they are last read. rows: positions that a layer is fitted on. ridge: λ,
    times the mean of diag(X Xᵀ), at least. rounds: of the fit below zero, where a ReLU follows.
    tick: called once a weight. Raises WrongUse where the graphs differ in more than widths.
    """
    module = copy.deepcopy(small.module)
    result = small.with_module(module)
    run = _Run(
        *_pair(dense, small, data, batch), couplings, keep, rows, ridge, rounds,
        torch.Generator().manual_seed(seed), tick,
    )  # fmt: skip
    run.all()
    state = module.state_dict()
    for name, value in run.b.parameters.items():
        state[name].copy_(value)
    return result


def _pair(
    dense: Network, small: Network, data: Tensor, batch: int
) -> tuple[Steps, Steps, list[Tensor]]:
    a, batches = steps_of(dense, data, batch)
    b, same = steps_of(small, data, batch)
    left, right = ([operator(n) or n.op for n in _running(s)] for s in (a, b))
    if left != right or len(batches) != len(same):
        raise WrongUse(
            f"the smaller network's graph has other operators than that of {dense.source}",
            "only networks whose widths alone differ can be compensated",
        )
    return a, b, batches


def _running(steps: Steps) -> list[fx.Node]:
    """The nodes that compute tensors, in order; where parameters are looked up, and whether sizes
    are counted, differs between graphs."""
    counted = set(_counts(steps))
    return [n for n in steps.nodes if n.op != "get_attr" and n not in counted]


def _counts(steps: Steps) -> list[fx.Node]:
    """The nodes that compute sizes from the input's: of the batch, such as batch * heads. A graph
    whose sizes were rewritten says -1 in their place."""
    found: list[fx.Node] = []
    for n in steps.nodes:
        if isinstance(n.meta.get("val"), int | torch.SymInt) and all(
            source.op == "placeholder" or source in found for source in n.all_input_nodes
        ):
            found.append(n)
    return found


@dataclass
class _Run:
    """a: the dense network's graph; b: the smaller one's; m: nodes of a; n: nodes of b. nodes: node
    of b -> the same of a."""

    a: Steps
    b: Steps
    batches: list[Tensor]
    couplings: Couplings
    keep: Keep
    rows: int
    ridge: float
    rounds: int
    generator: torch.Generator
    tick: Callable[[int], None] | None
    dense: Values = field(default_factory=dict)
    small: Values = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = dict(zip(_running(self.b), _running(self.a), strict=True))

    def all(self) -> None:
        names = dict(weighted(self.b.graph))
        moved: set[fx.Node] = set()
        count = len(self.batches)
        for steps, values in ((self.a, self.dense), (self.b, self.small)):
            for node in steps.nodes:
                if node.op == "get_attr":
                    values[node] = steps.compute(node, values, count)
        for n, m in self.nodes.items():
            if m.op == "placeholder":
                self.dense[m] = self.small[n] = list(self.batches)
                for steps, values in ((self.a, self.dense), (self.b, self.small)):
                    for node in _counts(steps):
                        values[node] = steps.compute(node, values, count)
                continue
            if m not in self.dense:
                self.dense[m] = self.a.compute(m, self.dense, count)
            if any(s in moved for s in n.all_input_nodes) or self._cut(m, n):
                moved.add(n)
                if n in names and self._solvable(n):
                    self._solve(m, n, names[n])
            if n in names and self.tick:
                self.tick(1)
            self.small[n] = self.b.compute(n, self.small, count)
            self.a.forget(m, self.dense)
            self.b.forget(n, self.small)

    def _cut(self, m: fx.Node, n: fx.Node) -> bool:
        """Whether a parameter of dense node m has become smaller."""
        stored = ([s for s in node.all_input_nodes if s.op == "get_attr"] for node in (m, n))
        return any(
            self.a.stored(t).shape != self.b.stored(s).shape for t, s in zip(*stored, strict=False)
        )

    def _solvable(self, n: fx.Node) -> bool:
        weight = n.args[1]
        return (
            isinstance(weight, fx.Node)
            and self.b.readers(weight) == {n}
            and Window.of(n) is not None
        )

    def _solve(self, m: fx.Node, n: fx.Node, name: str) -> None:
        """Put a new weight and bias for node n in the place of its own."""
        window, tail = Window.of(n), tail_of(self.b, n, self.small)
        if window is None:
            return
        for step in tail.nodes:  # the dense network runs ahead, up to the target
            if self.nodes[step] not in self.dense:
                self.dense[self.nodes[step]] = self.a.compute(
                    self.nodes[step], self.dense, len(self.batches)
                )
        problem = self._problem(m, n, window, tail, name)
        weight = self.b.tensor(n.args[1])  # type: ignore[arg-type]
        scale, shift = _scale(self.b, tail.norm) if tail.norm else (None, None)
        start = weight.flatten(1) if scale is None else weight.flatten(1) * scale.unsqueeze(1)
        bias = n.args[2] if len(n.args) > 2 else None
        own = isinstance(bias, fx.Node) and bias.op == "get_attr" and self.b.readers(bias) == {n}
        found, constant = fit(
            problem, start, self.ridge, self.rounds, free=tail.norm is not None or own,
        )  # fmt: skip
        if scale is not None and shift is not None and tail.norm is not None:
            found = found / scale.unsqueeze(1)
            if isinstance(bias, fx.Node):
                shift = shift - self.b.tensor(bias)
            self._set(tail.norm.weight, scale * tail.norm.spread(self.b))
            self._set(tail.norm.bias, constant + scale * shift)
        elif own and isinstance(bias, fx.Node):
            self._set(bias, constant)
        self._set(n.args[1], found.view_as(weight))  # type: ignore[arg-type]

    def _set(self, node: fx.Node, value: Tensor) -> None:
        name = str(node.target)
        self.b.parameters[name] = value.to(self.b.stored(node).dtype)
        for n in self.b.nodes:
            if n.op == "get_attr" and str(n.target) == name:
                self.small[n] = [self.b.parameters[name]] * len(self.batches)

    def _problem(self, m: fx.Node, n: fx.Node, window: Window, tail: Tail, name: str) -> Problem:
        """Rows of inputs and targets at some positions of every batch."""
        kept = self.couplings.kept(name, self.keep)[0]
        source, end = n.args[0], self.nodes[tail.nodes[-1]] if tail.nodes else m
        images = sum(len(b) for b in self.batches)
        xs, ts, others = [], [], []
        for i in range(len(self.batches)):
            y = self.dense[end][i]
            channels = y.shape[1 if window.kernel else -1]
            at = window.positions(y, self.rows * channels * y.shape[0] / images / y.numel(),
                                  self.generator)  # fmt: skip
            xs.append(window.inputs(self.small[source][i], at))  # type: ignore[index]
            ts.append(window.outputs(y, at)[:, kept.to(y.device)])
            if tail.other is not None:
                others.append(window.outputs(self.small[tail.other][i], at))
        other = torch.cat(others).float() if others else None
        return Problem(torch.cat(xs, 1).float(), torch.cat(ts).float(), other, tail.low, tail.high)


def _scale(b: Steps, norm: Norm) -> tuple[Tensor, Tensor]:
    """(scale of a batch norm, its running mean); a scale near zero cannot carry a new weight, and
    is raised to the middle one."""
    scale = b.tensor(norm.weight) / norm.spread(b)
    middle = scale.abs().median().clamp(min=1e-6)
    small = scale.abs() < 0.05 * middle
    return torch.where(small, middle, scale), b.tensor(norm.mean)
