"""A training that Lightning runs in one or two processes, which write the student's weights."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from killed_learning import data, network
from safetensors.torch import save_file

from lighten.course import ImageCourse
from lighten.learn import learn
from lighten.lesson import Lesson

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    student, teacher, held_out = network(4, 1), network(4, 0).eval(), data(5, 32)
    # norms and dropout see each process's own part of a batch: without them both ways are the same
    for module in (student, teacher):
        module[1], module[3] = torch.nn.Identity(), torch.nn.Identity()
    learned = learn(
        student, teacher, Lesson.parse("logits:1,hidden:0.1"), ImageCourse(data(2, 48)),
        length="12steps", rate=0.05, batch=12, folder=folder / "states", precision="32-true",
        evaluate=lambda m: -float((m(held_out) - teacher(held_out)).square().mean()),
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto",
    )  # fmt: skip
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    save_file(student.state_dict(), folder / f"student-{rank}.safetensors")
    print(learned.best)
