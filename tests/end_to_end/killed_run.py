"""One compress() that kills itself: python killed_run.py MODEL TEXT OUT KEY, at the storing of KEY.

KEY: the beginning of the run's key at whose storing, before anything is written, the process dies.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from lighten import pipeline, run

OPTIONS: dict[str, Any] = {"budget": "60%", "samples": 4, "length": 32}


def main() -> None:
    model, text, out, key = sys.argv[1:]
    placed = run.place

    def place(target: Path, *rest: Any) -> Any:
        if str(target.relative_to(out)).startswith(key):
            os.kill(os.getpid(), signal.SIGKILL)
        return placed(target, *rest)

    if key:
        run.place = place
    pipeline.compress(model, data=text, out=out, **OPTIONS)


if __name__ == "__main__":
    main()
