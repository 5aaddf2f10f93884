"""What the loss says of every weight: mean and mean square of its gradient over samples.

Without labels the loss is the cross entropy to labels drawn from the network's own predictions:
then the mean square is the diagonal of the Fisher matrix, the curvature of the KL divergence to
the network as it is, and nobody has to have labels. (The mean is then noise around zero.)

*Source:* Kunstner et al. 2019, "Limitations of the empirical Fisher approximation for natural
gradient descent", on why labels are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lighten.errors import BadInput, WrongUse
from lighten.network import Network
from lighten.types import Stats

Loss = Callable[[Any, "Tensor | None"], Tensor]
"""(outputs of one sample, its label or None) -> scalar."""


@dataclass(frozen=True)
class Gradient:
    """Of one parameter, in its own shape: mean and mean square over `n` samples, in nats a unit."""

    mean: Tensor
    square: Tensor
    n: int


def gradients(
    network: Network,
    data: Tensor | Iterable[Any],
    loss: Loss | None = None,
    seed: int = 0,
) -> dict[str, Gradient]:
    """Parameter -> its gradient. data: (count, ...) inputs, or batches of inputs or of
    (inputs, labels), as a DataLoader gives them.

    loss: of one sample; without, the cross entropy to the label, or where there is none to one
    drawn from the network's own prediction. Raises BadInput where there is no data or the loss is
    not finite, WrongUse for a network of several inputs or outputs that are no logits.
    """
    if len(network.inputs) != 1:
        raise WrongUse(
            f"{network.source} takes {len(network.inputs)} inputs, and the data gives one",
            "wrap it in a module that takes one",
        )
    given = loss or _Likelihood(seed)
    named = {k: p.detach() for k, p in network.module.named_parameters() if p.is_floating_point()}
    mean = {k: torch.zeros_like(p) for k, p in named.items()}
    square = {k: torch.zeros_like(p) for k, p in named.items()}
    n = 0
    for x, label in _samples(data, network.device):
        leaves = {k: p.requires_grad_() for k, p in ((k, t.detach()) for k, t in named.items())}
        with torch.enable_grad():
            value = given(torch.func.functional_call(network.module, leaves, (x,)), label)
            if value.numel() != 1 or not bool(torch.isfinite(value)):
                raise BadInput(
                    f"the loss of sample {n} is {value.detach().flatten()[:4].tolist()}",
                    "a loss is one finite number",
                )
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        for name, g in zip(leaves, found, strict=True):
            if g is not None:
                mean[name] += g
                square[name] += g.square()
        n += 1
    if n == 0:
        raise BadInput("there is no sample to take gradients of", "give data of at least one")
    return {k: Gradient(mean[k] / n, square[k] / n, n) for k in named}


def with_gradients(stats: Mapping[str, Stats], found: Mapping[str, Gradient]) -> dict[str, Stats]:
    """Stats by parameter, slope and curvature as (out, in) in them; made where there are none.

    Where there is a Hessian, `gradient` (out,) is set too: the curvature seen as a product
    gradient_i * H_jj, so that lighten.candidates predicts nats (per sample, all positions).
    *Source:* Grosse and Martens 2016, "A Kronecker-factored approximate Fisher matrix for
    convolution layers", section 3 (the factors' expectation is taken of the product here).
    """
    out = dict(stats)
    for name, g in found.items():
        if g.mean.dim() < 2:
            continue
        old = out.get(name, Stats(g.n, g.mean.new_empty(0)))
        curvature = g.square.flatten(1)
        gradient = old.gradient
        if old.hessian.dim() == 2:
            seen = old.hessian.diagonal().sum().clamp(min=1e-30).to(curvature)
            gradient = curvature.sum(1) / seen
        out[name] = replace(old, slope=g.mean.flatten(1), curvature=curvature, gradient=gradient)
    return out


class _Likelihood:
    """Minus the log probability of a label, given or drawn, summed over all positions."""

    def __init__(self, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)

    def __call__(self, outputs: Any, label: Tensor | None) -> Tensor:
        logits = getattr(outputs, "logits", outputs)
        if isinstance(logits, tuple | list) and logits:
            logits = logits[0]
        if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise WrongUse(
                f"the network's output ({shape}) is not logits (batch, classes)",
                "give the loss: a function of one sample's outputs and label",
            )
        rows = logits.flatten(0, -2).log_softmax(-1)
        if label is None:
            chances = rows.detach().exp().cpu()
            chosen = torch.multinomial(chances, 1, generator=self.draw).to(rows.device)
        else:
            chosen = label.reshape(-1, 1).long()
        return -rows.gather(1, chosen).sum()


def _samples(
    data: Tensor | Iterable[Any], device: torch.device
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """One sample (1, ...) and its label (1, ...) at a time: squares do not come from sums."""
    for batch in [data] if isinstance(data, Tensor) else data:
        if isinstance(batch, tuple | list):
            x, labels = batch[0], batch[1] if len(batch) > 1 else None
        else:
            x, labels = batch, None
        for i in range(len(x)):
            label = None if labels is None else torch.as_tensor(labels[i])[None].to(device)
            yield x[i : i + 1].to(device), label
