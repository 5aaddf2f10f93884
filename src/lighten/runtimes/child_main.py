"""A process in which a runtime is asked: one JSON request on stdin, one JSON answer on stdout.

    python child_main.py FILE

FILE defines TASKS, name -> function of the request, and FAILURES, the exceptions that are answers.
Both are started by their paths and import nothing of ours: so the process's resident memory is the
runtime's and a bare interpreter's, without torch, and a crash of native code ends this process
only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import Any


def main(path: str) -> None:
    # Native code may print: stdout is kept for the answer, whatever else goes there joins the log.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # The names of this file's folder must not hide those of installed packages.
    sys.path[:] = [p for p in sys.path if p != os.path.dirname(os.path.abspath(__file__))]
    spec = importlib.util.spec_from_file_location("child", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} cannot be imported")
    child = sys.modules["child"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(child)
    request = json.load(sys.stdin)
    try:
        answer: dict[str, Any] = {"answer": child.TASKS[request["task"]](request)}
    except child.FAILURES as error:
        answer = {"failed": str(error), "why": type(error).__name__}
    with answers:
        json.dump(answer, answers)


if __name__ == "__main__":
    main(sys.argv[1])
