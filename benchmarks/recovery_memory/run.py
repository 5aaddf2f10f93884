"""Peak memory of recovering a language model, with gradient checkpoints and without.

    python benchmarks/gguf_quality/rescale.py
    python benchmarks/recovery_memory/run.py [--steps 2] [--format q4_0] [--quick]

The rescaled SmolLM2, every weight rounded to one format, learns back in steps of 1024 tokens as
`lighten compress --recover` does it; each row is a process of its own. Its resident memory is read
from the kernel: at rest, when original, student and text are there, and at its highest while it
learns. --quick learns one step and writes no result.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lighten.language_student import LanguageModel, LanguageStudent, Recomputed
from lighten.learn import learn
from lighten.lesson import Lesson
from lighten.measure import head_of
from lighten.model import open_model
from lighten.recover_language import RATE, TOKENS
from lighten.registry import formats
from lighten.sliced_lesson import SlicedLesson
from lighten.text_course import TextCourse
from lighten.types import Compressed, Spec

HERE = Path(__file__).parent
MODEL = Path.home() / ".cache" / "lighten" / "peer" / "smollm2-rescaled"
ROWS = [(mode, kept) for mode in ("scales", "all") for kept in (True, False)]
"""What learns (see LearnedWeight), and whether blocks are gradient checkpoints."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--format", default="q4_0")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.mode is not None:
        print(json.dumps(one(asked)))
        return
    rows = []
    for mode, kept in ROWS:
        steps = "1" if asked.quick else str(asked.steps)
        done = subprocess.run(
            [sys.executable, __file__, "--model", str(asked.model), "--steps", steps, "--window",
             str(asked.window), "--format", asked.format, "--mode", mode,
             *([] if kept else ["--plain"])],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        rows.append(json.loads(done.stdout))
        print(rows[-1])
    found = {
        "model": "SmolLM2-135M-Instruct, rescaled", "format": asked.format, "tokens": TOKENS,
        "window": asked.window, "steps": asked.steps, "threads": torch.get_num_threads(),
        "torch": torch.__version__.partition("+")[0], "machine": platform.machine(), "rows": rows,
    }  # fmt: skip
    if not asked.quick:
        text = json.dumps(found, indent=1) + "\n"
        (HERE / "result.json").write_text(text, encoding="utf-8")


def one(asked: argparse.Namespace) -> dict[str, Any]:
    """Memory of a few steps; as lighten.recover_language sets them up."""
    model = open_model(asked.model)
    student = LanguageStudent(model, rounded(model, asked.format), mode=asked.mode)
    siblings: Any = student.module.get_submodule(model.blocks[0].rpartition(".")[0])
    for each in siblings:
        assert isinstance(each, Recomputed)
        each.kept.count = len(siblings) if asked.plain else 0  # not as memory allows
    teacher = LanguageModel(model, {})
    head = head_of(model, *teacher.head())
    batch = TOKENS // asked.window
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(len(head.weight), (asked.steps * batch, asked.window), generator=drawn)
    lesson: Any = SlicedLesson(Lesson.parse("logits:1"), student.head, head)
    rest = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins again
    began = time.process_time()
    learn(
        student, teacher, lesson, TextCourse(ids), length=f"{asked.steps}steps", rate=RATE,
        batch=batch, evaluate=lambda module: 0.0, optimizer="adamw", weight_decay=0.0,
        precision="32-true", accelerator="cpu", name="learn",
    )  # fmt: skip
    return {
        "mode": asked.mode, "checkpoints": not asked.plain,
        "trained": sum(p.numel() for p in student.parameters()), "rest_bytes": rest,
        "peak_bytes": resident("VmHWM"),
        "processor_seconds_per_step": (time.process_time() - began) / asked.steps,
    }  # fmt: skip


def rounded(model: Any, name: str) -> dict[str, Compressed]:
    """Every weight to the nearest of a format, or of q8_0 where its rows do not fit."""
    found = {}
    for layer in model.layers:
        weight = model.weight(layer)
        for kind in (name, "q8_0"):
            format = formats[kind]
            if layer.shape[1] % format.step == 0:
                break
        grid = format.fit(weight)
        parts = format.pack(format.encode(weight, grid), grid)
        found[layer.name] = Compressed(Spec(format=kind), layer.shape, format, parts)
    return found


def resident(key: str) -> int:
    """Bytes in memory, of a line of the kernel's account of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise SystemExit(f"the kernel does not say {key}: this needs Linux")


if __name__ == "__main__":
    main()
