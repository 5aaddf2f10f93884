"""One compress() per KEY that kills itself: python killed_run.py MODEL TEXT FOLDER KEY...

Each runs in FOLDER/<number of the key>/run and dies by SIGKILL where something is about to be
stored whose place in the run holds KEY, before anything is written. KEY `verify`: when the export
is written, but not yet in its place.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from lighten import pipeline, run
from lighten.model import open_model
from lighten.runtimes import llama_cpp

OPTIONS: dict[str, Any] = {"budget": "60%", "samples": 4, "length": 32}


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(key: str, model: str, text: str, out: Path) -> None:
    placed = run.place

    def place(target: Path, *rest: Any) -> Any:
        if key in str(target.relative_to(out)):
            die()
        return placed(target, *rest)

    if key == "verify":
        pipeline.verify = die
    else:
        run.place = place
    llama_cpp.speed = lambda path, **_: llama_cpp.Speed(1.0, 2.0, 3.0, 4)
    pipeline.compress(model, data=text, out=out, **OPTIONS)


def main() -> int:
    model, text, folder, *keys = sys.argv[1:]
    opened = open_model(model)
    print(len(opened.layers), len(opened.tokenizer))  # what it takes is imported once, then forked
    for i, key in enumerate(keys):
        child = os.fork()
        if child == 0:
            try:
                killed_at(key, model, text, Path(folder) / str(i) / "run")
            finally:
                os._exit(1)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
            print(f"not killed at {key}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
