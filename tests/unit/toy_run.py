"""A toy pipeline over a run directory, and a script that kills it at every step that matters.

python toy_run.py FOLDER boundaries|moments  ->  JSON {"kills": how many, "differing": [...]}
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from lighten.progress import be_quiet
from lighten.run import Run

REQUEST = {"model": "toy", "budget": "80MB", "seed": 0}
UNITS = ["embed", "layer/0", "layer/1"]


def work(folder: Path, pause: float = 0.0) -> None:
    """Every kind of stage that a run has, in the order in which a pipeline uses them."""
    with Run.open(folder, REQUEST) as run:
        done = {row["unit"] for row in run.read("candidates")}
        for unit in UNITS:
            if unit not in done:
                time.sleep(pause)
                rows = [{"unit": unit, "format": f, "error": len(unit) * f} for f in (2, 4, 8)]
                run.append("candidates", rows)
        plan = run.json("plan", lambda: dict.fromkeys(UNITS, 4))
        for unit in UNITS:
            run.once(
                f"weights/{unit}.bin",
                lambda unit=unit: (time.sleep(pause), unit.encode() * 1000 * plan[unit])[1],
                save=lambda value, path: path.write_bytes(value),
                load=lambda path: path.read_bytes(),
                given=plan[unit],
            )
        run.file("model", lambda path: _write_folder(path, pause))
        run.file("exports/model.gguf", lambda path: _write_slowly(path, pause))
        run.json("metrics", lambda: {"bytes": 12.5, "worse": None})


def snapshot(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of everything but the manifest (it holds seconds) and the lock."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("manifest.jsonl", ".lock")
    }


def _write_folder(path: Path, pause: float) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")
    time.sleep(pause)
    (path / "model.bin").write_bytes(bytes(range(256)) * 50)


def _write_slowly(path: Path, pause: float) -> None:
    with open(path, "wb") as file:
        for part in range(3):
            file.write(bytes([part]) * 5000)
            file.flush()
            time.sleep(pause)


def _in_child(job: object) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            job()  # type: ignore[operator]
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _killed_at_step(folder: Path, step: int) -> None:
    """Die by SIGKILL just before the step-th call that makes something last."""
    calls = itertools.count(1)

    def deadly(real: object) -> object:
        def call(*args: object, **named: object) -> object:
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **named)  # type: ignore[operator]

        return call

    for name in ("fsync", "replace", "truncate", "mkdir", "rmdir", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))
    work(folder)


def _killed_after(folder: Path, seconds: float) -> None:
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    work(folder, pause=0.004)
    signal.setitimer(signal.ITIMER_REAL, 0)


def main(folder: Path, how: str) -> None:
    be_quiet()
    work(folder / "whole")
    expected = snapshot(folder / "whole")
    kills, differing = 0, []
    luck = random.Random(0)
    for step in itertools.count(1):
        here = folder / f"{how}{step}"
        if how == "boundaries":
            status = _in_child(lambda here=here, step=step: _killed_at_step(here, step))
            if status == 0:
                break
        else:
            if step > 20:
                break
            for _ in range(3):  # a run that is killed again and again
                after = luck.uniform(0.001, 0.06)
                status = _in_child(lambda here=here, after=after: _killed_after(here, after))
                kills += status == -signal.SIGKILL
        kills += how == "boundaries" and status == -signal.SIGKILL
        resumed = _in_child(lambda here=here: work(here))
        if status not in (0, -signal.SIGKILL) or resumed or snapshot(here) != expected:
            differing.append([step, status, resumed])
            break
    print(json.dumps({"kills": kills, "differing": differing}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
