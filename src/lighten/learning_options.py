"""Options of `compress` that say what is learned back, how long and from what."""

from __future__ import annotations

from typing import Annotated

import typer

Recover = Annotated[
    str | None,
    typer.Option(help='Then learn what was lost back: "10epochs" or "500steps".'),
]
LearnFrom = Annotated[
    str | None,
    typer.Option(
        help='What is learned from, without a word "logits:1", or "outputs:1" where outputs are no'
        " logits; see docs/concepts/losses.md."
    ),
]
Rate = Annotated[
    float | None, typer.Option(help="Highest learning rate of --recover, of a network.")
]
Augment = Annotated[
    str | None,
    typer.Option(
        help='Of images to learn from: "crop+flip", "crop+flip+cutmix", "flip", "none"; "both"'
        ' behind "crop+" in place of "flip": each beside its mirror image.'
    ),
]
Mirrored = Annotated[
    bool | None,
    typer.Option(
        help="The original answers with the mean over an image and its mirror image; without a"
        " word it does where images are mirrored to learn from and the lesson looks at outputs"
        " only."
    ),
]
Optimizer = Annotated[
    str | None,
    typer.Option(help='Of --recover, of a network: "sgd" (without a word), "adamw" or "muon".'),
]
Patience = Annotated[
    int | None,
    typer.Option(min=1, help="Of --recover: evaluations without a better one, then it stops."),
]
Learn = Annotated[
    str | None,
    typer.Option(
        help='Of a network, "100steps" in which the scales of its integers learn;'
        ' with --recover as long, up to 100 steps, or "none".'
    ),
]
LearnCodes = Annotated[
    bool | None, typer.Option("--learn-codes", help="Let the integers themselves learn, too.")
]
