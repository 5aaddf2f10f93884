"""What a run keeps so that it can be looked at: look/<name>.json, each whole or absent.

Layers, axes, the trade-off curve, where the two models differ, provenance: see
docs/reference/metrics-schema.md. Made at the end of a run, from what the run has stored; the page
(lighten.report) reads it. Nothing here changes what a run has made.
"""

from __future__ import annotations

from collections.abc import Callable

from lighten.atomic import JSON
from lighten.extras import told
from lighten.run import Run

FOLDER = "look"


def keep(run: Run, name: str, fn: Callable[[], JSON], *, given: JSON = None) -> bool:
    """Store what fn gives as look/<name>.json; whether it is there.

    A run is not lost because it cannot be looked at: see lighten.extras.
    """
    with told(f"{FOLDER}/{name}.json"):
        run.json(f"{FOLDER}/{name}", fn, given=given)
        return True
    return False
