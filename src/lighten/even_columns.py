"""Columns of a language model's weights made even before they are rounded: the same function.

A column times s, and what writes that channel divided by s, compute the same. Weights of a row that
share a step are rounded best where all of them are about as large, so s = 1 / size of the column.
Where the writer is a norm, a gated unit's `up` or attention's `v`, this costs no byte and no time.

    model = scaled_columns(model, column_scales(model))    # one pass over the weights

Nothing is held in memory but the scales: weights are multiplied when they are read.

*Source:* Nagel et al. 2019, "Data-Free Quantization" (arXiv 1906.04721), section 4.1, for ranges;
Lin et al. 2023, "AWQ" (arXiv 2306.00978), section 3.2, for the places in language models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lighten.errors import WrongUse
from lighten.families.rope import head_dim
from lighten.model import Model
from lighten.progress import stage
from lighten.registry import families
from lighten.run import Run
from lighten.tensors import LazyTensor, held, scaled

LARGEST = 8.0
"""No column is scaled further, up or down: one that is nearly zero would be without end, and what
it is multiplied by might leave the numbers that a runtime in float16 has."""


@dataclass(frozen=True)
class Place:
    """Where a factor cancels. writer: a module whose output channels are scaled, its weight a norm
    (width,) or (width, in). readers: the weights of all that read them, (out, columns); columns is
    a multiple of the width where heads share channels."""

    writer: str
    readers: tuple[str, ...]


def refuses(model: Model) -> str | None:
    """Why the columns of a model cannot be scaled, or None."""
    if model.kind == "gguf":
        return "what is in a GGUF file mostly lies on a grid, which scaling would take it off"
    if model.family is None or not families[model.family].scalable:
        return "no place is known in it where a factor cancels"
    return None


def places(model: Model) -> list[Place]:
    """Every place of the model, block by block, linear writers first; raises WrongUse."""
    if why := refuses(model):
        raise WrongUse(
            f"columns of {model.source} cannot be made even: {why}",
            "leave it out" + (", or give the Hugging Face folder" if model.kind == "gguf" else ""),
        )
    return [
        Place(f"{prefix}.{writer}", tuple(f"{prefix}.{reader}.weight" for reader in readers))
        for prefix in model.blocks
        for writer, readers in families[str(model.family)].scalable
    ]


def evened(run: Run, model: Model) -> Model:
    """The model with even columns; their scales are stored in the run."""
    return scaled_columns(model, run.tensors("model/columns", lambda: column_scales(model)))


@torch.no_grad()
def column_scales(model: Model) -> dict[str, Tensor]:
    """What the columns that read each writer are multiplied by: its weight's name -> (width,)."""
    found: dict[str, Tensor] = {}
    layers = {layer.name: layer for layer in model.layers}
    with stage("even columns", len(each := places(model)), "places") as tick:
        for place in each:
            name = f"{place.writer}.weight"
            squares = torch.zeros(layers[place.readers[0]].shape[1])
            for reader in place.readers:
                weight = model.weight(layers[reader])
                if reader in found:  # it writes channels that were scaled before
                    weight /= found[reader][:, None]
                squares += weight.square_().sum(0)
            width = model.tensors[name].shape[0]
            found[name] = _bounded(_by_channel(squares, width, model).sqrt())
            tick()
    return found


@torch.no_grad()
def scaled_columns(model: Model, scales: Mapping[str, Tensor]) -> Model:
    """The model with columns times these scales, and what writes them divided by the same.

    A norm stays in its type: it is rounded once divided, and its readers get the exact quotient.
    """
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    tensors, layers = dict(model.tensors), {layer.name: layer for layer in model.layers}
    for place in places(model):
        name, bias = f"{place.writer}.weight", f"{place.writer}.bias"
        scale = scales[name]
        if len(tensors[name].shape) == 1:
            tensors[name], scale = _divided(tensors[name], scale)
        else:
            rows[name] = 1 / scale
        if bias in tensors:
            tensors[bias] = scaled(tensors[bias], 1 / scale)
        for reader in place.readers:
            columns[reader] = _by_column(scale, layers[reader].shape[1], model)
    for name in rows.keys() | columns.keys():
        sides = rows.get(name), columns.get(name)
        turned = layers[name].transposed
        tensors[name] = scaled(tensors[name], *(reversed(sides) if turned else sides))
    return model.with_tensors(tensors)


def _by_channel(columns: Tensor, width: int, model: Model) -> Tensor:
    """(width,): means over the columns that read the same channel: those of one number within the
    heads of a group."""
    if len(columns) == width:
        return columns
    wide = head_dim(model.config)
    return columns.view(width // wide, -1, wide).mean(1).flatten()


def _by_column(scale: Tensor, columns: int, model: Model) -> Tensor:
    """(columns,): what each column is multiplied by; the inverse of _by_channel."""
    if len(scale) == columns:
        return scale
    wide = head_dim(model.config)
    return scale.view(-1, 1, wide).expand(-1, columns // len(scale), -1).flatten()


def _bounded(size: Tensor) -> Tensor:
    """(width,): 1 / size, 1 for the column in the middle and for those with nothing in them."""
    some = size > size.max() * 1e-3
    middle = size[some].median() if bool(some.any()) else 1.0
    scale = (middle / size).clamp(1 / LARGEST, LARGEST)
    return torch.where(size > 0, scale, 1.0)


def _divided(norm: LazyTensor, scale: Tensor) -> tuple[LazyTensor, Tensor]:
    """A norm divided and rounded to its type, and what it was divided by then."""
    before = norm.load()
    after = (before.float() / scale).to(before.dtype)
    works = after.isfinite() & (after != 0) & (before != 0)
    after = torch.where(works, after, before)
    exact = torch.where(works, before.float() / after.float(), 1.0)
    return held(after, norm), exact
