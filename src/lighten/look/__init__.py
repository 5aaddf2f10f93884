"""What a run keeps so that it can be looked at: look/<name>.json, each whole or absent.

Layers, axes, the trade-off curve, where the two models differ, provenance: see
docs/reference/metrics-schema.md. Made at the end of a run, from what the run has stored; the page
(lighten.report) reads it. Nothing here changes what a run has made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from lighten.atomic import JSON
from lighten.errors import UserError
from lighten.progress import note
from lighten.run import Run

FOLDER = "look"


def keep(run: Run, name: str, fn: Callable[[], JSON], *, given: JSON = None) -> bool:
    """Store what fn gives as look/<name>.json; whether it is there.

    A run is not lost because it cannot be looked at: errors are told and passed over. What is no
    UserError is a mistake in the program, and also a warning (which fails a test).
    """
    try:
        run.json(f"{FOLDER}/{name}", fn, given=given)
    except UserError as error:
        note(f"{FOLDER}/{name}.json was left out: {error.message}")
    except Exception as error:  # whatever it is, the run is whole without it
        told = f"{FOLDER}/{name}.json was left out: {type(error).__name__}: {error}"
        note(told)
        warnings.warn(told, RuntimeWarning, stacklevel=2)
    else:
        return True
    return False
