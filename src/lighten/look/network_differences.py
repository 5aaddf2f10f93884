"""Where a compressed network differs: the examples it disagrees on most, and the confusions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lighten.look.pictures import are_pictures, picture
from lighten.samples import Samples
from lighten.seen import IGNORED

WORST = 12
"""Examples that are kept, those with the largest divergence."""

CLASSES = 100
"""Classes up to which all confusions are kept: of more, the table would be a page of zeros."""


def differences(before: Tensor, after: Tensor, samples: Samples) -> dict[str, Any]:
    """{"kind", "classes", "confusion", "worst"}; see docs/reference/metrics-schema.md.

    before, after: outputs of both networks on samples.held_out, (count, classes) logits; of other
    outputs nothing can be told, and so only "kind".
    """
    before, after = logits(before), logits(after)
    shape = samples.held_out.shape[1:]
    found: dict[str, Any] = {"kind": "images" if are_pictures(shape) else "examples"}
    if before.ndim != 2 or before.shape[1] < 2:
        return found
    if samples.classes:
        found["classes"] = list(samples.classes)
    if samples.labels is not None and before.shape[1] <= CLASSES:
        found["confusion"] = {
            "before": confusion(before, samples.labels),
            "after": confusion(after, samples.labels),
        }
    return found | {"worst": _worst(before, after, samples)}


def confusion(outputs: Tensor, labels: Tensor) -> list[list[int]]:
    """How often a class (row) was answered by a class (column), of examples with a label."""
    count = outputs.shape[1]
    outputs, labels = outputs[labels != IGNORED], labels[labels != IGNORED]
    cells = labels.long() * count + outputs.argmax(1)
    table = torch.bincount(cells, minlength=count * count).view(count, count)
    return [[int(cell) for cell in row] for row in table.tolist()]


def logits(outputs: Tensor) -> Tensor:
    """Those that come as (count, classes, 1, 1) as (count, classes)."""
    flat = outputs.flatten(1) if outputs.ndim > 2 else outputs
    return flat if flat.shape[1:].numel() == outputs.shape[1:2].numel() else outputs


def _label(samples: Samples, index: int) -> int | None:
    found = IGNORED if samples.labels is None else int(samples.labels[index])
    return None if found == IGNORED else found


def _worst(before: Tensor, after: Tensor, samples: Samples) -> list[dict[str, Any]]:
    p, q = before.double().log_softmax(1), after.double().log_softmax(1)
    kld = (p.exp() * (p - q)).sum(1).clamp_min(0)
    shown = are_pictures(samples.held_out.shape[1:])
    found = []
    for index in kld.argsort(descending=True, stable=True)[:WORST].tolist():
        answers = int(p[index].argmax()), int(q[index].argmax())
        row: dict[str, Any] = {
            "example": index,
            "label": _label(samples, index),
            "before": answers[0],
            "after": answers[1],
            "before_probability": round(float(p[index, answers[0]].exp()), 4),
            "after_probability": round(float(q[index, answers[1]].exp()), 4),
            "kld": round(float(kld[index]), 4),
        }
        if shown:
            row["png"] = picture(samples.held_out[index], samples.normalised)
        found.append(row)
    return found
