"""A run directory becomes one HTML file that needs nothing else: no network, no other file.

    write("runs/small")                  # -> runs/small/report.html

run/*.json, run/look/*.json -> facts -> sections of the page; nothing here changes a run, and
nothing here computes what a run has not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write(
    run: Path | str | Sequence[Path | str], path: Path | str | None = None, lang: str | None = None
) -> Path:
    """Write the page of a run, or of several side by side; returns where.

    path: without, report.html in the run; of several, comparison.html beside the first. lang: "en"
    or "zh", without the locale's. Raises WrongUse where there is no run, UnknownName.
    """
    from lighten.report import compare, page
    from lighten.report.facts import of_run

    runs = [Path(run)] if isinstance(run, (str, Path)) else [Path(one) for one in run]
    if len(runs) == 1:
        target = Path(path) if path is not None else runs[0] / "report.html"
        return page.save(page.render(of_run(runs[0]), lang), target)
    target = Path(path) if path is not None else runs[0].resolve().parent / "comparison.html"
    return page.save(compare.render([of_run(one) for one in runs], lang), target)


def offered(runs: Sequence[Path], path: Path | None = None, lang: str | None = None) -> Path | None:
    """`write`; where no path is given and the folder cannot be written to, None and a note."""
    from lighten.errors import UserError
    from lighten.progress import note

    try:
        found = write(runs, path, lang)
    except UserError as error:
        if path is not None or not isinstance(error.__cause__, OSError):
            raise
        note(f"there is no page: {error.message}; --html says where else to put it")
        return None
    note(f"a page to look at: {found}")
    return found


def kept(run: Path | str) -> Path | None:
    """Write a finished run's page, and model cards beside what it exported; what cannot be written
    loses no run, and is told.

    Returns where the page is, or None.
    """
    from lighten.extras import told

    cards(run)
    with told("the page of this run"):
        return offered([Path(run)])
    return None


def cards(run: Path | str) -> list[Path]:
    """Write README.md beside what a run has exported; that it cannot be written is told. Returns
    where they are."""
    from lighten.extras import told
    from lighten.report import card

    with told("the model card"):
        return card.write(run)
    return []


def open_in_browser(path: Path | str) -> Any:
    """Show a page in the user's browser; returns whether one was found."""
    import webbrowser

    return webbrowser.open(Path(path).resolve().as_uri())
