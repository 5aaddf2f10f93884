"""The command line: a few verbs, each a screenful at most, no logic.

stdout is data, stderr is talk. Exit codes: 0 done, 1 failed or worse than a plain baseline, 2 wrong
use, 130 stopped by ^C.
"""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lighten import distill_options as options
from lighten.errors import UserError
from lighten.learning_options import (
    Augment,
    Learn,
    LearnCodes,
    LearnFrom,
    Mirrored,
    Optimizer,
    Patience,
    Rate,
    Recover,
)
from lighten.options import (
    AsJson,
    Crop,
    Data,
    Examples,
    Folder,
    Kind,
    Length,
    Mean,
    Model,
    Page,
    Quiet,
    Runs,
    Samples,
    Seed,
    Size,
    Std,
    Test,
    TestImages,
    Version,
    Weights,
)
from lighten.progress import complain, note

app = typer.Typer(
    name="lighten",
    help="A trained network and a budget in; the best network that fits out, with the proof.",
    epilog="lighten compress MODEL --budget 90MB   is all that most people need.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _lighten(version: Version = False, quiet: Quiet = False) -> None:
    pass


@app.command()
def compress(
    model: Model,
    budget: Annotated[
        str | None,
        typer.Option(
            help='"80MB" of file, "4.5bpw" (bits per weight), "25%" of the size now;'
            ' of a network also "0.5 macs", "2M params", "12ms", "50% ms".'
        ),
    ] = None,
    max_kld: Annotated[
        float | None,
        typer.Option(help="Instead of a budget: the smallest model that loses no more nats."),
    ] = None,
    data: Data = None,
    export: Annotated[
        str | None,
        typer.Option(help="The file to write; `lighten list exporters` names them."),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="Of a network: mixed, int8, w4a8, w4a4, w8, w4, none (without: auto)."),
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option(help='Of a network: weights that go too, "0.5" or "2:4".')
    ] = None,
    weights: Weights = None,
    test: TestImages = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    crop: Crop = None,
    multiple: Annotated[
        int | None, typer.Option(min=1, help="Channel counts are multiples of it.")
    ] = None,
    recover: Recover = None,
    learn_from: LearnFrom = None,
    rate: Rate = None,
    augment: Augment = None,
    mirrored: Mirrored = None,
    optimizer: Optimizer = None,
    patience: Patience = None,
    learn: Learn = None,
    learn_codes: LearnCodes = None,
    even_columns: Annotated[
        bool | None,
        typer.Option(
            "--even-columns",
            help="Of a language model: scale columns of weights before they are rounded.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder. Without: runs/<model>-<budget>.")
    ] = None,
    samples: Examples = None,
    length: Length = 512,
    seed: Seed = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make MODEL fit the budget, export it and measure what it lost. The same line resumes."""
    from lighten import front

    result = front.compress(
        model,
        budget=budget,
        max_kld=max_kld,
        data=data,
        test=test,
        export=export,
        quantize=quantize,
        sparsity=sparsity,
        multiple=multiple,
        weights=weights,
        size=size,
        mean=mean,
        std=std,
        crop=crop,
        recover=recover,
        learn_from=learn_from,
        rate=rate,
        augment=augment,
        mirrored=mirrored,
        optimizer=optimizer,
        patience=patience,
        learn=learn,
        learn_codes=learn_codes,
        even_columns=even_columns,
        out=out,
        samples=samples,
        length=length,
        seed=seed,
    )
    _show(result.metrics, as_json)


@app.command()
def distill(
    teacher: options.Teacher,
    student: options.Student,
    data: options.Lessons,
    teacher_weights: Weights = None,
    student_weights: Weights = None,
    length: options.Span = None,
    learn_from: options.LearnFrom = None,
    temperature: options.Temperature = None,
    tune: options.Trials = None,
    augment: options.Augment = None,
    mirrored: Mirrored = None,
    rate: options.Rate = None,
    batch: options.Batch = None,
    accumulate: options.Accumulate = 1,
    optimizer: options.Optimizer = None,
    patience: options.Patience = None,
    export: options.Export = None,
    test: Test = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    crop: Crop = None,
    multiple: options.Multiple = 1,
    samples: options.MadeOn = None,
    window: options.Window = None,
    out: options.Out = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Let a student learn from TEACHER, save it and measure it. The same line resumes."""
    from lighten.distill import distill

    result = distill(
        teacher, student, data, length=length, learn_from=learn_from, temperature=temperature,
        tune=tune, test=test, export=export, augment=augment, rate=rate, batch=batch,
        mirrored=mirrored,
        accumulate=accumulate, optimizer=optimizer, patience=patience, multiple=multiple,
        teacher_weights=teacher_weights, student_weights=student_weights, size=size, mean=mean,
        std=std, crop=crop, samples=samples, window=window, out=out, seed=seed,
    )  # fmt: skip
    note(f"the student is in {result.folder / 'model'}")
    _show(result.metrics, as_json)


@app.command()
def plan(
    run: Folder,
    budget: Annotated[str, typer.Option(help="The other budget, such as 70MB.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Spend another budget from the candidates that RUN has stored, in seconds."""
    from lighten import pipeline

    _show(pipeline.replan(run, budget), as_json)


@app.command()
def export(
    run: Folder,
    to: Annotated[str, typer.Option(help="`lighten list exporters` names them.")],
    quiet: Quiet = False,
) -> None:
    """Write the compressed model of RUN in another form; prints where it is."""
    from lighten import pipeline

    print(pipeline.export(run, to))


@app.command()
def report(
    runs: Runs,
    html: Annotated[
        Path | None,
        typer.Option(help="Where the page goes. Without: RUN/report.html, or comparison.html."),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
    lang: Annotated[
        str | None, typer.Option(help='Of the page: "en" or "zh". Without: the locale\'s.')
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """What RUN has done and measured, as a page and in short; several runs side by side."""
    from lighten import report as pages
    from lighten.summary import of_runs

    facts = of_runs(runs)
    path = pages.offered(runs, html, lang)
    if show and path is not None and not pages.open_in_browser(path):
        note("there is no browser here to show it")
    _show(facts, as_json)


@app.command()
def measure(
    model: Model,
    against: Annotated[
        str | None, typer.Option(help="The reference, to compare with on the same data.")
    ] = None,
    data: Data = None,
    weights: Weights = None,
    against_weights: Annotated[
        Path | None, typer.Option(help="Of a reference that is a network.")
    ] = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    crop: Crop = None,
    samples: Samples = None,
    length: Length = 512,
    seed: Seed = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Quality, bytes, speed and memory of any model or .onnx file, with 95 % intervals."""
    from lighten.front_measure import measure as measured

    found = measured(
        model,
        against=against,
        data=data,
        weights=weights,
        against_weights=against_weights,
        size=size,
        mean=mean,
        std=std,
        crop=crop,
        samples=samples,
        length=length,
        seed=seed,
    )
    _show(found, as_json)


@app.command()
def inspect(
    model: Model,
    weights: Weights = None,
    size: Size = None,
    html: Page = None,
    data: Data = None,
    mean: Mean = None,
    std: Std = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """What MODEL is made of, where its bytes and MACs are, what can shrink, which formats fit."""
    from lighten.front_inspect import inspect as look

    _show(
        look(model, weights=weights, size=size, html=html, data=data, mean=mean, std=std), as_json
    )


@app.command("list")
def list_(
    kind: Kind = None,
    as_json: AsJson = False,
) -> None:
    """What there is to choose from."""
    from lighten.listing import listing

    _show(listing(kind), as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/demo"),
    budget: Annotated[str, typer.Option(help="Size of the file to make.")] = "80MB",
    prompt: Annotated[
        str, typer.Option(help="What the compressed model is asked.")
    ] = "Give three tips for staying healthy.",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compress a real model that pip brings along (SmolLM2-135M) and let it answer."""
    from lighten import demo as demonstration

    _show(demonstration.demo(out=out, budget=budget, prompt=prompt), as_json)


def _show(facts: object, as_json: bool) -> None:
    from lighten.summary import problems, show

    show(facts, as_json)
    for problem in problems(facts):
        complain(problem)
    if problems(facts):
        raise typer.Exit(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; what is no UserError keeps its traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(words or ["--help"], prog_name="lighten", standalone_mode=False)
    except UserError as error:
        complain(error.message, error.hint)
        return error.exit_code
    except _UsageError as error:
        complain(*_usage(error))
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        again = f"; what is done stays done. To go on:\n  {shlex.join(['lighten', *words])}"
        note(f"stopped{again if _RESUMED & set(words) else ''}")
    return code if isinstance(code, int) else 0


_RESUMED = {"compress", "demo", "distill", "export", "plan"}

# typer takes it from click, or since 0.2x from its own copy of click, and exports it under no name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


def _usage(error: Exception) -> tuple[str, str]:
    """Message and hint of a usage error, the nearest names in the hint."""
    near = list(getattr(error, "possibilities", None) or [])
    text = error.message if near else error.format_message()  # type: ignore[attr-defined]
    message, _, guess = text.partition(" Did you mean ")
    near = [guess.strip("'? ")] if guess else near
    near = difflib.get_close_matches(message.split()[-1].strip("'."), near, 2) or near[:1]
    context = getattr(error, "ctx", None)
    help_line = f"`{context.command_path if context else 'lighten'} --help` shows what there is"
    hint = f"did you mean {' or '.join(f'`{n}`' for n in near)}? " if near else ""
    return message.rstrip("."), hint + help_line


if __name__ == "__main__":
    sys.exit(main())
