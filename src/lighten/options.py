"""Options that several verbs of the command line share, each told in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lighten.progress import be_quiet


def _quiet(value: bool) -> None:
    if value:
        be_quiet()


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"lighten {version('lighten')}")
        raise typer.Exit


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder or hub id, a .gguf file; package.module:factory,"
        " file.py:factory or a .pt2 file for a network; to measure, an .onnx file too.",
    ),
]
Folder = Annotated[
    Path, typer.Argument(metavar="RUN", help="The folder that `compress` wrote (its --out).")
]
Page = Annotated[
    Path | None,
    typer.Option("--html", help="A page to look at too: the map of its layers, what can shrink."),
]
Kind = Annotated[
    str | None,
    typer.Argument(
        metavar="[KIND]",
        help="formats, solvers, criteria, losses, transforms, exporters or families.",
    ),
]
Runs = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Folders that `compress` or `distill` wrote.")
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Text: .txt, .jsonl or a folder of them (without: a text that lighten has)."
        " Images: a folder for each class, a zip, .parquet or .npz."
    ),
]
Weights = Annotated[
    Path | None, typer.Option(help="Of a network: .safetensors, or .pt with tensors only.")
]
Test = Annotated[Path | None, typer.Option(help="Other images, or text, to measure on.")]
TestImages = Annotated[
    Path | None, typer.Option("--test", help="Other images to measure on, of a network.")
]
Size = Annotated[int | None, typer.Option(min=1, help="Side of the images that a network takes.")]
Mean = Annotated[
    str | None, typer.Option(help='Of pixels in [0, 1]: "0.485,0.456,0.406" or "imagenet".')
]
Std = Annotated[str | None, typer.Option(help="The same for the standard deviation.")]
Crop = Annotated[
    str | None, typer.Option(help='"center", "squash", or the share of the side that is kept.')
]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Windows of text (64) or images (2048) to measure on.")
]
Examples = Annotated[
    int | None,
    typer.Option(min=1, help="Windows of text (64) or images (1024) to calibrate on."),
]
Length = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same bytes.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout instead of tables.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", callback=_quiet, is_eager=True, help="Only errors.")
]
Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and stop.")
]
