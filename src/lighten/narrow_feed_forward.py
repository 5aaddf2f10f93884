"""Feed-forward parts of a language model made narrower: the units that cost least go.

A unit is one input of the matrix that leads out of the part, and a row of those that lead in. What
it costs is what is lost once the others have made up for it, summed over the outputs; then they do
make up for it, by least squares on the same inputs. Block by block, each on what the blocks before
it make of the windows now.

*Source:* Hassibi and Stork 1993, "Optimal brain surgeon", equation 5; Kurtic et al. 2023, "ZipLM",
section 3.1 (whole columns, scored and made up for with the inverse Hessian).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lighten.calibrate import Stream, hessians, submodule
from lighten.containers.safetensors import Entry
from lighten.errors import WrongUse
from lighten.model import Model
from lighten.smaller_model import feed_forward_width, stored_dtype, write
from lighten.types import Layer

DAMPING = 0.01
"""Of the mean diagonal, added where units make up for others."""

_ROUND = 32
"""Units are a multiple of it where they were: what runtimes' blocks of weights hold."""


@dataclass(frozen=True)
class FeedForward:
    """into: the matrices (units, width) that lead in. out: (width, units), which leads out."""

    into: tuple[Layer, ...]
    out: Layer


def feed_forwards(model: Model) -> list[FeedForward]:
    """One for each block; raises WrongUse where a block does not have exactly one."""
    _, units = feed_forward_width(model)
    found = []
    for index, name in enumerate(model.blocks):
        parts: dict[str, list[Layer]] = {}
        for layer in model.layers:
            if layer.block == index:
                home = layer.name.rpartition(".")[0].rpartition(".")[0]
                parts.setdefault(home.removeprefix(name), []).append(layer)
        known = [f for home, p in parts.items() if "att" not in home and (f := _part(p, units))]
        outside = [o for o in model.others if o.startswith(f"{name}.")]
        if len(known) != 1 or outside:
            what = f"holds `{outside[0]}`" if outside else f"has {len(known)} of {units} units"
            raise WrongUse(
                f"block `{name}` of {model.source} has no single feed-forward part that can be"
                f" made narrower: it {what}",
                'ask for fewer layers only, such as "half depth"',
            )
        found += known
    return found


def units_of(share: float, units: int, multiple: int = 1) -> int:
    """How many units are about this share: a multiple of `multiple`, and of 32 where they were.

    >>> units_of(0.5, 1536), units_of(0.5, 90), units_of(0.01, 64, 8)
    (768, 45, 32)
    """
    step = math.lcm(multiple, 1 if units % _ROUND else _ROUND)
    return min(units, max(step, int(share * units / step + 0.5) * step))


@torch.no_grad()
def write_narrow(
    model: Model, path: Path, share: float, windows: Tensor, multiple: int = 1,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Model, Tensor, int]:  # fmt: skip
    """The model with about `share` of the units of each part: (opened, what its head is given for
    the first window if it was cut rightly, units).

    windows: (count, length) token ids, to judge on. tick: called once a block. Raises WrongUse.
    """
    parts = feed_forwards(model)
    key, units = feed_forward_width(model)
    count = units_of(share, units, multiple)
    cut: dict[str, Tensor] = {}
    stream = Stream(model, windows)
    for i in stream:
        block, part, prefix = stream.load(i), parts[i], model.blocks[i]
        with hessians(block, prefix, [part.out]) as sums:
            for _, hidden in stream.batches():
                stream.run(i, block, hidden)
        stats = next(iter(sums.values())).stats()
        weight = model.weight(part.out).to(stats.hessian.device)
        keep = _costs(weight, stats.hessian).topk(count).indices.sort().values
        out = torch.zeros_like(weight)
        kind = stored_dtype(model, part.out.name)
        out[:, keep] = _made_up_for(weight, stats.hessian, keep).to(kind).float()
        _put(block, prefix, part.out, out)
        cut[part.out.name] = _stored(out[:, keep], part.out, kind)
        for layer in part.into:
            rows = model.weight(layer)[keep.cpu()]
            cut[layer.name] = _stored(rows, layer, stored_dtype(model, layer.name))
            bias = f"{layer.name.rpartition('.')[0]}.bias"
            if bias in model.tensors:
                kept = model.tensors[bias].load()[keep.cpu()]
                cut[bias] = kept.to(stored_dtype(model, bias))
        stream.advance(i, block)
        tick()
    entries = [
        Entry(name, stored_dtype(model, name), tuple(cut.get(name, lazy).shape))
        for name, lazy in model.tensors.items()
    ]

    def load(name: str) -> Tensor:
        whole = cut[name] if name in cut else model.tensors[name].load()
        return whole.to(stored_dtype(model, name))

    expected = next(stream.outputs())
    return write(model, path, {key: count}, entries, load), expected, count


def _part(members: list[Layer], units: int) -> FeedForward | None:
    """The part that these matrices of one module are, if they are one: the last leads out."""
    *into, out = members
    width = out.shape[0]
    if not into or out.shape[1] != units or any(layer.shape != (units, width) for layer in into):
        return None
    return FeedForward(tuple(into), out)


def _costs(weight: Tensor, hessian: Tensor) -> Tensor:
    """(units,): |W_j|² (1 / [(H + λI)⁻¹]_jj - λ): what is lost without a unit, the damping's own
    share of it left out, so that a unit that is always zero costs nothing."""
    damped = hessian.double()
    damping = DAMPING * damped.diagonal().mean().clamp(min=1e-12)
    damped = damped + damping * torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal()
    return weight.double().square().sum(0) * (1 / inverse - damping).clamp(min=0)


def _made_up_for(weight: Tensor, hessian: Tensor, keep: Tensor) -> Tensor:
    """(out, kept): W H[:, k] (H[k, k] + λI)⁻¹."""
    inside = hessian[keep][:, keep].double()
    damping = DAMPING * inside.diagonal().mean().clamp(min=1e-12)
    inside.diagonal().add_(damping)
    wanted = weight.double() @ hessian[:, keep].double() + damping * weight[:, keep].double()
    found: Tensor = torch.linalg.solve(inside, wanted.T)
    return found.T.float()


def _put(block: nn.Module, prefix: str, layer: Layer, value: Tensor) -> None:
    owner = block.get_submodule(submodule(layer.name, prefix))
    parameter: Tensor = owner.weight  # type: ignore[assignment]
    parameter.copy_(value.T if layer.transposed else value)


def _stored(value: Tensor, layer: Layer, kind: torch.dtype) -> Tensor:
    return (value.T if layer.transposed else value).to("cpu", kind).contiguous()
