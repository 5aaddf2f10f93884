"""A compress(recover=) that kills itself: python killed_recovery.py MODEL TEXT FOLDER PREFIX COUNT.

It dies by SIGKILL where the file number COUNT whose name begins with PREFIX is about to be placed.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from test_recover_language import ASKED, BLOCK_STEPS, TOKENS, WINDOWS

from lighten import learn_state, pipeline, recover_language
from lighten.runtimes import llama_cpp


def main() -> int:
    model, text, out, prefix, last = sys.argv[1:]
    placed, count = learn_state.place, 0

    def place(target: Path, *rest: Any) -> Any:
        nonlocal count
        count += target.name.startswith(prefix)
        if count == int(last):
            os.kill(os.getpid(), signal.SIGKILL)
        return placed(target, *rest)

    learn_state.place = place
    recover_language.TOKENS, recover_language.BLOCK_STEPS = TOKENS, BLOCK_STEPS
    recover_language.HEAD_WINDOWS = WINDOWS
    llama_cpp.speed = lambda path, **_: llama_cpp.Speed(1.0, 2.0, 3.0, 4)
    pipeline.compress(model, data=text, budget="45%", out=Path(out), **ASKED)
    return 1


if __name__ == "__main__":
    sys.exit(main())
