"""Measure networks and ONNX files: what they lost beside another, size and speed.

Either side may be a network (a module, package.module:factory, a .pt2 file), run by torch, or an
.onnx file of anybody's, run by onnxruntime. Both see the same examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lighten import network_cost
from lighten.errors import WrongUse
from lighten.loaders import check_finite, known
from lighten.network_quality import all_outputs, measure_network
from lighten.progress import stage
from lighten.samples import HELD_OUT, gathered

BATCH = 64


@dataclass(frozen=True, eq=False)
class Subject:
    """One side. shape: of an example, None where the file leaves it open. cost: what it weighs,
    and of a file how fast it is: that takes seconds."""

    name: str
    run: Callable[[Tensor], Any]
    shape: tuple[int | None, ...]
    cost: Callable[[], dict[str, Any]]


def measure_networks(
    mine: Subject,
    other: Subject | None,
    data: Any,
    *,
    source: str = "",
    count: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Facts about a network or an ONNX file, as lighten.measure gives them of language models.

    data: examples, with labels for accuracy, of any kind that lighten.samples takes; `count` of
    them are used, 2048 where nothing is said. The facts are {"model", "against", "data",
    "examples", "measured", "reference", "notes"}. measured: bytes; of a network parameters and
    macs, of a file p50_ms, p90_ms, p99_ms, peak_memory_bytes; accuracy with labels; beside another
    top1_agreement, mean_kld (nats), sqnr_db and more. reference: bytes and the like of the other.
    Raises UserError.
    """
    if count is not None and count < 1:
        raise WrongUse(f"{count} examples to measure on", "give at least 1")
    x, labels = gathered(data, HELD_OUT if count is None else count, seed)
    labels = known(labels)
    for side in (mine, other):
        if side is not None:
            _check(side, x)
    check_finite(x)
    with stage("measure"):
        reference = None if other is None else all_outputs(other.run, x, BATCH)
        found = measure_network(mine.run, x, labels, reference=reference, size=BATCH).as_dict()
    facts: dict[str, Any] = {
        "model": mine.name,
        "against": None if other is None else other.name,
        "data": source or str(getattr(data, "source", "") or f"a {type(data).__name__}"),
        "examples": found.pop("examples"),
    }
    if other is not None:
        before = found.pop("reference_accuracy", None)
        facts["reference"] = {**other.cost(), **({} if before is None else {"accuracy": before})}
    facts["measured"] = {**mine.cost(), **found}
    facts["notes"] = _notes(data, len(x), labels, other)
    return facts


def is_file(model: Any) -> bool:
    """Whether a model is an ONNX file."""
    return isinstance(model, str | Path) and str(model).endswith(".onnx")


def subject(model: Any) -> Subject:
    """One side of a comparison: a Network, or the path of an .onnx file.

    Raises UserError where it is no network of one input.
    """
    if not is_file(model):
        if len(model.inputs) != 1:
            raise WrongUse(
                f"{model.source} takes {len(model.inputs)} inputs; one can be measured",
                "wrap it in a module that takes one tensor",
            )
        return Subject(
            model.source, model, tuple(model.inputs[0].shape[1:]),
            lambda: {"bytes": model.nbytes, **network_cost.sizes(model)},
        )  # fmt: skip
    from lighten.runtimes import onnxruntime

    session = onnxruntime.Session(model)
    sizes = session.shapes
    if len(sizes) != 1:
        raise WrongUse(f"{model} takes {len(sizes)} inputs; one can be measured")
    batch, *rest = sizes[0] or (None,)
    return Subject(
        str(model), Batches(session, batch), tuple(rest),
        lambda: network_cost.speed("onnx", Path(model)),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Batches:
    """A session for batches of any size, where the file may take only those of `size`."""

    session: Callable[[Tensor], list[Tensor]]
    size: int | None

    def __call__(self, x: Tensor) -> list[Tensor]:
        if self.size is None:
            return self.session(x)
        found = []
        for part in torch.split(x, self.size):
            missing = self.size - len(part)
            whole = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])])
            # what is no output for each example is passed over by who measures
            found.append([y[: len(part)] if y.ndim else y for y in self.session(whole)])
        return [torch.cat(ys) if ys[0].ndim else ys[0] for ys in zip(*found, strict=True)]


def _check(side: Subject, x: Tensor) -> None:
    shape = tuple(x.shape[1:])
    same = len(shape) == len(side.shape) and all(
        n is None or n == m for n, m in zip(side.shape, shape, strict=True)
    )
    if not same:
        wanted = ", ".join("any" if n is None else str(n) for n in side.shape)
        raise WrongUse(
            f"the data is {shape} and {side.name} takes ({wanted})", "give --size, or other data"
        )


def _notes(data: Any, used: int, labels: Tensor | None, other: Subject | None) -> list[str]:
    found = []
    there = len(data) if hasattr(data, "tensor") and hasattr(data, "labels") else used
    if there > used:
        found.append(f"measured on {used:,} of {there:,} examples; --samples gives more")
    if labels is None and other is None:
        found.append("there are no labels and nothing to compare with: only costs are told")
    return found
