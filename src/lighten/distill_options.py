"""Options of `distill`: its student, its lesson, and how it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Teacher = Annotated[
    str,
    typer.Argument(
        metavar="TEACHER",
        help="package.module:factory, file.py:factory, .pt2; of language models a Hugging Face"
        " folder or hub id, or a .gguf file.",
    ),
]
Student = Annotated[
    str,
    typer.Option(
        help='The same, or what it is of its teacher: "half depth, half width", of a language'
        ' model also "8 layers"; with ", from scratch" its weights are drawn anew.'
    ),
]
Lessons = Annotated[
    Path,
    typer.Option(
        help="Images: a folder for each class, zip, parquet, npz. Text: .txt, .jsonl or a folder."
    ),
]
Span = Annotated[
    str | None, typer.Option(help='"10epochs" or "500steps": the first of images, without a word.')
]
LearnFrom = Annotated[
    str | None,
    typer.Option(
        help='"logits:1,hidden:0.1"; without a word "logits:1", or "outputs:1" where outputs are no'
        " logits; see docs/concepts/losses.md."
    ),
]
Temperature = Annotated[float | None, typer.Option(help="Of the losses that do not say their own.")]
Trials = Annotated[
    int | None, typer.Option(min=1, help="So many short trials choose temperature and weights.")
]
Augment = Annotated[
    str | None,
    typer.Option(
        help='"crop+flip" (for images, without a word), "crop+flip+cutmix", "flip", "none"; "both"'
        ' behind "crop+" in place of "flip": each beside its mirror image.'
    ),
]
Rate = Annotated[float | None, typer.Option(help="Highest learning rate.")]
Batch = Annotated[
    int | None,
    typer.Option(min=1, help="Images (128), or windows of text (4096 tokens' worth) in a batch."),
]
Optimizer = Annotated[
    str | None, typer.Option(help='"sgd" (of images, without a word), "adamw" (of text) or "muon".')
]
Patience = Annotated[
    int | None, typer.Option(min=1, help="Evaluations without a better one, then it stops.")
]
Accumulate = Annotated[
    int, typer.Option(min=1, help="Parts that a batch is computed in, for less memory.")
]
Export = Annotated[str | None, typer.Option(help='Beside the weights: "onnx", or "gguf" of text.')]
Multiple = Annotated[
    int, typer.Option(min=1, help="Channel counts of a made student are multiples of it.")
]
MadeOn = Annotated[
    int | None,
    typer.Option(
        min=1, help="Images (1024) or windows (64) that a student is made from the teacher on."
    ),
]
Window = Annotated[int | None, typer.Option(min=2, help="Tokens in a window of text (512).")]
Out = Annotated[
    Path | None, typer.Option(help="The run's folder. Without: its own for each request.")
]
