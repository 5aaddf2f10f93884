"""What a run can do without: a failure there is told, and loses nothing that was computed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lighten.errors import UserError
from lighten.progress import note


@contextmanager
def told(what: str) -> Iterator[None]:
    """Whatever is raised inside ends the block and is told: `what` was left out, and why.

    What is no UserError is a mistake in the program, and also a warning (which fails a test).
    """
    try:
        yield
    except UserError as error:
        note(f"{what} was left out: {error.message}")
    except Exception as error:  # whatever it is, the run is whole without it
        line = f"{what} was left out: {type(error).__name__}: {error}"
        note(line)
        warnings.warn(line, RuntimeWarning, stacklevel=3)
