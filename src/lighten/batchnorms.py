"""Batch norms of a smaller network: their statistics again from data, if that really helps.

A norm's running mean and variance are those that training saw. When channels go, what reaches the
norm is something else, and the statistics can be taken again: the mean over batches of what each
norm sees, the norms before it being on their batch's statistics too. Without compensation that
mends much; after least squares, which put scale and shift where the running statistics need them,
it may do harm. So part of the data is held out, and what is closer to the dense network there
stays.

*Source:* Ioffe and Szegedy 2015, "Batch Normalization", algorithm 2 (statistics of the population
from many batches).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lighten.errors import BadInput, BadOutput
from lighten.network import Network
from lighten.network_quality import all_outputs, compare_outputs
from lighten.network_results import score

HELD = 4
"""One in so many images is kept to decide on."""

LEAST = 32
"""Images to decide on, and to take statistics from, at least."""

NORMS = "decided:batch norms"
"""What `Norms.as_tensor` is called beside a state dict."""

_CALLED = inspect.signature(functional.batch_norm)
_OPERATOR = torch.ops.aten.batch_norm.default


@dataclass(frozen=True, eq=False)
class Norms:
    """What was decided. before, after: mean KL divergence in nats to the dense network (relative
    error where outputs are no logits), norms as they were and taken again; None: not tried.
    why_not: why they were not tried, "" where they were or there are none."""

    network: Network
    before: float | None = None
    after: float | None = None
    why_not: str = ""

    @property
    def again(self) -> bool:
        """Whether the network has new statistics."""
        return self.before is not None and self.after is not None and self.after < self.before

    def as_tensor(self) -> Tensor:
        """(2,) float64: before and after, NaN where nothing was tried."""
        tried = (self.before, self.after)
        numbers = [math.nan if value is None else value for value in tried]
        return torch.tensor(numbers, dtype=torch.float64)

    @classmethod
    def of_tensor(cls, stored: Tensor, network: Network) -> Norms:
        """What `as_tensor` kept, for the network that was decided on."""
        before, after = (None if math.isnan(v) else v for v in stored.tolist())
        return cls(network, before, after)

    @property
    def said(self) -> str:
        """What was decided and why, in a sentence; "" where there are no batch norms."""
        if self.before is None or self.after is None:
            return f"batch norms are as they were: {self.why_not}" if self.why_not else ""
        what = "re-estimated" if self.again else "as they were"
        return (
            f"batch norms are {what}: on held-out images the distance to the original is"
            f" {self.before:.3g} with them as they were, {self.after:.3g} re-estimated"
        )


@torch.no_grad()
def better_norms(
    dense: Callable[[Tensor], Any], small: Network, data: Tensor, *, batch: int = 64
) -> Norms:
    """`small`, or a copy whose batch norms have statistics of `data`, whichever is closer to
    `dense` on a quarter of the data (at least 32 examples) that the statistics are not taken from.

    data: (count, ...) inputs, 64 at least: with fewer nothing is tried.
    """
    held = max(LEAST, len(data) // HELD)
    why_not = ""
    if len(data) - held < LEAST:
        why_not = f"{len(data)} images are too few, {2 * LEAST} are needed"
    elif not _any_batch(small):
        why_not = "the network works for one size of batch only"
    if why_not:
        return Norms(small, why_not=why_not if _normed(small) else "")
    at = torch.arange(len(data)) % (len(data) // held) == 0
    at &= at.cumsum(0) <= held
    seen, kept = data[~at], data[at]
    again = reestimated(small, seen, batch=batch)
    if again is small:
        return Norms(small)
    wanted = all_outputs(dense, kept, batch)
    before, after = (_distance(network, kept, wanted, batch) for network in (small, again))
    return Norms(again if after < before else small, before, after)


@torch.no_grad()
def reestimated(network: Network, data: Tensor, *, batch: int = 64) -> Network:
    """A copy of a network whose batch norms have the mean statistics over equal batches of data;
    the network itself where it has no batch norm.

    All that calls `batch_norm` with running statistics is reached: modules, functions on buffers,
    exported graphs. Nothing else is put into training mode.
    """
    found = network.with_module(copy.deepcopy(network.module))
    with _Statistics() as statistics:
        for part in data.tensor_split(max(1, len(data) // batch)):
            found(part.to(found.device))
    return found if statistics.seen else network


def _normed(network: Network) -> bool:
    """Whether a network calls a batch norm with running statistics."""
    with _Statistics(taken=False) as statistics:
        network(*network.inputs)
    return bool(statistics.seen)


def _any_batch(network: Network) -> bool:
    """Whether a network takes batches of any size; only an exported graph may not."""
    if not isinstance(network.module, fx.GraphModule):
        return True
    try:
        return network.flexible is not None
    except BadInput:
        return False


def _distance(network: Network, data: Tensor, wanted: Sequence[Tensor], batch: int) -> float:
    """What plans are compared by, the other way round: smaller is better; inf for NaN outputs."""
    try:
        found = compare_outputs(all_outputs(network, data, batch), reference=wanted, resamples=2)
    except BadOutput:
        return float("inf")
    return -score(found.as_dict())


class _Statistics(TorchFunctionMode):
    """Every batch norm that is called uses its batch's statistics, and its buffers become their
    cumulative mean. taken=False: they are counted alone, and compute as they are."""

    def __init__(self, taken: bool = True) -> None:
        super().__init__()
        self.taken = taken
        self.seen: dict[int, int] = {}  # address of a running variance -> batches in its mean

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.batch_norm:
            named = _CALLED.bind(*args, **kwargs)
            named.apply_defaults()
            x, mean, var, weight, bias, _, _, eps = named.arguments.values()
        elif func in (_OPERATOR, torch.batch_norm):
            x, weight, bias, mean, var, _, _, eps, _ = args
        else:
            return func(*args, **kwargs)
        if mean is None or var is None:  # it always uses its batch's
            return func(*args, **kwargs)
        count = self.seen[var.data_ptr()] = self.seen.get(var.data_ptr(), 0) + 1
        if not self.taken:
            return func(*args, **kwargs)
        return functional.batch_norm(x, mean, var, weight, bias, True, 1 / count, eps)
