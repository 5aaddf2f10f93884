"""What a distillation keeps so that it can be looked at: how it is made again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lighten.distill_request import Request
from lighten.look import keep
from lighten.look.provenance import provenance
from lighten.run import Run

_ASKED = ("length", "learn_from", "tune", "export", "augment", "rate", "batch", "optimizer",
          "patience", "average", "multiple", "seed")  # fmt: skip


def look(run: Run, asked: Request) -> None:
    """Store look/provenance.json of a distillation whose metrics stand."""
    keep(run, "provenance", lambda: _provenance(run, asked))


def _provenance(run: Run, asked: Request) -> dict[str, Any]:
    teacher, samples = asked.teacher, asked.samples
    typed = words()
    found = provenance(
        run, typed,
        model={"source": teacher.source, "digest": teacher.digest,
               "kind": type(teacher.module).__name__, "parameters": teacher.parameters,
               "bytes": teacher.nbytes},
        data={"source": samples.source, "digest": run.request["data"],
              "examples": len(samples.held_out)},
        seed=asked.how.seed,
    )  # fmt: skip
    return found if typed else {**found, "command": call(asked)}


def words() -> list[str]:
    """The line that was typed, where this process is the command line's; else none."""
    program = Path(sys.argv[0])
    ours = program.stem == "lighten" or program.parts[-2:] == ("lighten", "__main__.py")
    return ["lighten", *sys.argv[1:]] if ours and sys.argv[1:2] == ["distill"] else []


def call(asked: Request) -> str:
    """The call that makes a run of modules in memory, which no command line can name."""
    given = {key: asked.wanted.get(key) for key in _ASKED}
    told = [f"{key}={value!r}" for key, value in given.items() if value is not None]
    return f"lighten.distill({', '.join(['teacher', 'student', 'data', *told])})"
