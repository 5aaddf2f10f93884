"""What a distillation of a language model has to show: teacher, the student before and after, on
text that nothing was learned from or chosen by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lighten.calibrate import Stream
from lighten.distill_language_request import Request
from lighten.distill_results import worse
from lighten.divergence import Head, Positions
from lighten.measure import head_of, quality
from lighten.model import Model
from lighten.progress import stage
from lighten.results import as_gguf, speed
from lighten.run import Run

KLD = "measured/after"
"""Where in the run the divergence of each held-out position is, (windows, length - 1) in nats."""


def results(
    run: Run, asked: Request, begun: Model, made: Model, notes: list[str], exported: Path | None
) -> dict[str, Any]:
    """{"teacher", "before", "after"}: sizes and quality; "learning", "trials"; notes, problems."""
    windows, rows = asked.text.measured, list[Tensor]()
    learning = run.json("learned", dict)
    trials = run.json("tuned", dict)["trials"] if asked.trials is not None else []
    steps = len(asked.teacher.blocks) + len(begun.blocks) + len(made.blocks)
    with stage("measure", steps, "blocks") as tick:
        stream = Stream(asked.teacher, windows).through(tick)
        like = head_of(asked.teacher, *stream.head)
        reference = torch.stack(list(stream.outputs()))
        before = _quality(begun, windows, reference, like, tick)
        after = _quality(
            made, windows, reference, like, tick,
            lambda window: rows.append(cast("Tensor", window.kld).float()),
        )  # fmt: skip
    run.tensors(KLD, lambda: {"kld": torch.stack(rows)})
    teacher = {**_sizes(asked.teacher), "perplexity": before.pop("reference_perplexity")}
    after.pop("reference_perplexity")
    columns: dict[str, Any] = {
        "teacher": teacher,
        "before": {**_sizes(begun), **before},
        "after": {**_sizes(made), **after},
    }
    if exported is not None and asked.export == "gguf":
        columns["after"] |= speed(exported, made)
        with as_gguf(asked.teacher) as path:
            columns["teacher"] |= {} if path is None else speed(path, asked.teacher)
    said = [*notes, *made.notes]
    if learning["best_step"] == 0:
        said.append("nothing better was found on held-out text: the student is as it began")
    if asked.text.builtin:
        said.append("measured on the short text that lighten brings along; give --data")
    for part in ("before", "after"):
        counts = {k: columns[part].pop(k) for k in ("windows", "tokens")}
    return {
        **columns, **counts, "data": asked.text.source, "learn_from": learning["learn_from"],
        "learning": [dict(learning)], "trials": trials, "notes": list(dict.fromkeys(said)),
        "problems": worse(columns["before"], columns["after"]),
    }  # fmt: skip


def _quality(
    model: Model, windows: Tensor, reference: Tensor, like: Head, tick: Callable[[], None],
    seen: Callable[[Positions], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    stream = Stream(model, windows).through(tick)
    own = head_of(model, *stream.head)
    return quality(stream.outputs(), own, reference, like, windows, seen=seen).as_dict()


def _sizes(model: Model) -> dict[str, Any]:
    return {
        "bytes": model.nbytes, "parameters": model.parameters,
        "bits_per_weight": 8 * model.nbytes / model.parameters,
    }  # fmt: skip
