"""What a distillation has to show: teacher, the student before and after, on data that nothing was
chosen by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lighten import network_cost
from lighten.distill_request import Request
from lighten.errors import BadInput
from lighten.heads import classes_last
from lighten.network import Network
from lighten.network_quality import all_outputs, compare_outputs, score_of
from lighten.progress import stage
from lighten.seen import IGNORED

_HIDDEN = ("examples", "reference_accuracy", "accuracy_change")


def results(
    asked: Request, begun: Network, taught: Network, learning: Mapping[str, Any],
    trials: list[dict[str, Any]], exported: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """{"teacher", "before", "after"}: sizes and quality; "learning", "trials"; notes, problems."""
    notes = [*taught.notes]
    with stage("measure"):
        reference = all_outputs(asked.teacher, asked.samples.held_out, asked.how.batch)
        columns = {
            "teacher": _measured(asked, asked.teacher, None, notes),
            "before": _measured(asked, begun, reference, notes),
            "after": _measured(asked, taught, reference, notes),
        }
        if exported is not None and asked.export is not None:
            columns["after"] |= network_cost.speed(asked.export, exported)
    if learning["best_step"] == 0:
        notes.append("nothing better was found on held-out data: the student is as it began")
    return {
        **columns,
        "examples": len(asked.samples.held_out),
        "data": asked.samples.source,
        "learn_from": learning["learn_from"],
        "learning": [dict(learning)],
        "trials": trials,
        "notes": list(dict.fromkeys(notes)),
        "problems": worse(columns["before"], columns["after"]),
    }


def _measured(
    asked: Request, network: Network, reference: Sequence[Tensor] | None, notes: list[str]
) -> dict[str, Any]:
    sizes: dict[str, Any] = {"parameters": network.parameters}
    try:
        sizes = network_cost.sizes(network)
    except BadInput as error:
        notes.append(f"multiply-adds are not counted: {error.message}")
    x, labels = asked.samples.held_out, asked.samples.labels
    ours = all_outputs(network, x, asked.how.batch)
    if reference is not None and any(
        y.shape != x.shape for y, x in zip(reference, ours, strict=False)
    ):
        reference = None
    if labels is not None and not bool((labels != IGNORED).any()):
        labels = None
    if labels is not None:
        known = labels != IGNORED
        labels, ours = labels[known], tuple(y[known] for y in ours)
        reference = None if reference is None else [y[known] for y in reference]
    logits = _logits(asked, ours)
    found = compare_outputs(ours, labels, reference, logits=logits or labels is not None).as_dict()
    facts = {**sizes, **{k: v for k, v in found.items() if k not in _HIDDEN}}
    if asked.evaluate is not None:
        facts["evaluate"] = score_of(asked.evaluate(network))
    return facts


def _logits(asked: Request, ours: Sequence[Tensor]) -> bool:
    """Whether outputs are measured as logits, as they are what the best state is chosen by."""
    return not asked.lesson.numbers and all(classes_last(y).shape[-1] > 1 for y in ours)


def worse(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Where the student certainly does worse than before it learned: the intervals lie apart."""
    if "evaluate" in after:
        if after["evaluate"] < before["evaluate"]:
            return [f"evaluate fell from {before['evaluate']:.4g} to {after['evaluate']:.4g}"]
        return []
    for key, sign in (("accuracy", 1), ("mean_kld", -1), ("relative_error", -1)):
        if key in after and key in before:
            a, b = after[key], before[key]
            fell = a["high"] < b["low"] if sign > 0 else a["low"] > b["high"]
            what = key.replace("_", " ")
            return (
                [f"{what} went from {b['value']:.4g} to {a['value']:.4g}, on data not chosen by"]
                if fell
                else []
            )
    return []
