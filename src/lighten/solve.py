"""The second pass: every weight is solved on the inputs that the compressed prefix gives it.

One file per layer in the run directory, so a run that was stopped goes on at the layer where it
stopped: what is already solved is loaded and only moves the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from hashlib import sha256

import torch
from torch import Tensor

from lighten.calibrate import Stream
from lighten.model import Model
from lighten.registry import solvers
from lighten.run import Run
from lighten.sparse import format_of
from lighten.types import Compressed, Layer, Plan, Spec, Stats


class Weights(Mapping[str, Compressed]):
    """The compressed weights of a plan, in the run directory, loaded when asked for."""

    def __init__(self, run: Run, model: Model, plan: Plan, folder: str = "weights") -> None:
        self.run, self.model, self.plan = run, model, plan
        self.layers = {layer.name: layer for layer in model.layers}
        self.specs = {k: Spec.parse(v) for k, v in plan.specs.items() if Spec.parse(v).format}
        text = "\n".join(f"{k} {v}" for k, v in sorted(plan.specs.items()))
        self.folder = f"{folder}/{sha256(text.encode()).hexdigest()[:10]}"

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs  # solved or not

    def __getitem__(self, name: str) -> Compressed:
        return self.once(name, _missing)

    def once(self, name: str, fn: Callable[[], Mapping[str, Tensor]]) -> Compressed:
        """The stored weight, or the parts that fn computes, stored."""
        spec, layer = self.specs[name], self.layers[name]
        parts = self.run.tensors(f"{self.folder}/{name}", fn, given=str(spec))
        return Compressed(spec, layer.shape, format_of(spec), parts)

    def stored(self, name: str) -> bool:
        return self.run.whole(f"{self.folder}/{name}.safetensors", given=str(self.specs[name]))


def _missing() -> Mapping[str, Tensor]:
    raise KeyError("this weight has not been solved yet")


class Dense(Mapping[str, Tensor]):
    """The same weights as (out, in) float32, decoded when asked for."""

    def __init__(
        self, weights: Mapping[str, Compressed], only: Iterable[str] | None = None
    ) -> None:
        self.weights = weights
        self.names = [n for n in weights if only is None or n in set(only)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.weights[name].dense()


def solve(
    weights: Weights,
    windows: Tensor,
    outside: Mapping[str, Stats],
    *,
    device: torch.device | str = "cpu",
    tick: Callable[[], None] = lambda: None,
) -> Weights:
    """Solve what is not stored yet. windows: (count, length) token ids.

    outside: Stats of the layers that are in no block (embedding, head), from the first pass: the
    stream begins with a compressed embedding, so that has to be solved before there is a stream.
    """
    model = weights.model
    for layer in model.layers:
        if layer.block is None and layer.name in weights:
            weights.once(layer.name, partial(_alone, weights, layer, outside[layer.name]))
    first = [layer.name for layer in model.layers if layer.block is None]
    stream = Stream(model, windows, weights=Dense(weights, first), device=device)
    for index in stream:
        layers = [la for la in model.layers if la.block == index and la.name in weights]
        if not all(weights.stored(layer.name) for layer in layers):
            stats = stream.stats(index, stream.load(index))
            _solve_groups(weights, _alike(layers, weights), stats)
        mine = Dense(weights, [layer.name for layer in layers])
        stream.advance(index, stream.load(index, mine))
        tick()
    return weights


def _alike(layers: list[Layer], weights: Weights) -> list[list[Layer]]:
    """Layers that see the same input and get the same spec: rows of one problem."""
    groups: dict[tuple[str, str], list[Layer]] = {}
    for layer in layers:
        groups.setdefault((layer.shares, str(weights.specs[layer.name])), []).append(layer)
    return list(groups.values())


def _solve_groups(weights: Weights, groups: list[list[Layer]], stats: Mapping[str, Stats]) -> None:
    """Solve and store the groups of a block.

    A sweep is thousands of operations on one column each. On a CPU more threads gain nothing there
    and wait for each other, for long where other programs run; nor do groups side by side, which
    wait for the interpreter. So it is one thread meanwhile.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for group in groups:
            if all(weights.stored(layer.name) for layer in group):
                continue
            solved = _solve_group(weights, group, stats[group[0].shares])
            start = 0
            for layer in group:
                rows = torch.arange(start, start + layer.shape[0])
                start += layer.shape[0]
                weights.once(layer.name, partial(_rows, solved, rows))
    finally:
        torch.set_num_threads(threads)


def _solve_group(weights: Weights, group: list[Layer], stats: Stats) -> Compressed:
    """Solve several weights stacked: rows do not know of each other, and one sweep is faster."""
    stacked = torch.cat([weights.model.weight(layer).to(stats.hessian) for layer in group])
    spec = weights.specs[group[0].name]
    solved: Compressed = solvers[spec.solver or "gptq"](stacked, stats, spec)
    return solved


def _rows(solved: Compressed, rows: Tensor) -> Mapping[str, Tensor]:
    index = rows.to(next(iter(solved.parts.values())).device)
    return solved.rows(index).parts


def _alone(weights: Weights, layer: Layer, stats: Stats) -> Mapping[str, Tensor]:
    return _solve_group(weights, [layer], stats).parts
