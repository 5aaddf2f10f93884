"""A small training for tests: run as a program, it may be killed at any moment and started again.

python killed_learning.py FOLDER KILL_AT      (0: at no step; else SIGKILL to itself there)
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from lighten.course import ImageCourse
from lighten.learn import Learned, learn
from lighten.lesson import Lesson

STEPS = 24


def network(width: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Dropout(0.2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 3),
        )  # fmt: skip


def data(seed: int, count: int) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


class Counter:
    """A hook with a state of its own that the weights depend on, and that may kill the process."""

    def __init__(self, module: nn.Module, kill_at: int) -> None:
        self.module, self.kill_at, self.calls = module, kill_at, torch.zeros(())

    def __call__(self, step: int, steps: int) -> None:
        self.calls += 1
        with torch.no_grad():
            self.module[0].weight.mul_(1 + 1e-3 * self.calls)  # type: ignore[index, operator, union-attr]
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def state_dict(self) -> dict[str, object]:
        return {"calls": self.calls, "kind": "counter", "nested": [{"x": self.calls + 1}]}

    def load_state_dict(self, state: dict[str, object]) -> None:
        assert state["kind"] == "counter"
        self.calls = torch.as_tensor(state["calls"]).clone()


def training(
    folder: Path | None, kill_at: int = 0, optimizer: str = "sgd"
) -> tuple[nn.Module, Learned]:
    teacher, student = network(8, 0).eval(), network(4, 1)
    held_out = data(9, 64)
    wanted = teacher(held_out).argmax(1)

    def accuracy(module: nn.Module) -> float:
        return float((module(held_out).argmax(1) == wanted).double().mean())

    learned = learn(
        student, teacher, Lesson.parse("logits:1,hidden:0.1"),
        ImageCourse(data(2, 48), augment="crop+flip"), length=f"{STEPS}steps", rate=0.05, batch=12,
        evaluate=accuracy, folder=folder, optimizer=optimizer, average=0.9, clip=1.0, save_every=1,
        accumulate=2, every=5, precision="32-true", accelerator="cpu",
        after_step=[Counter(student, kill_at)],
    )  # fmt: skip
    return student, learned


def killed(folder: Path, kill_at: int, optimizer: str) -> None:
    """A child that kills itself at a step."""
    child = os.fork()
    if child == 0:
        training(folder, kill_at, optimizer)
        os._exit(1)  # never reached
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
        sys.exit(f"{folder} was not killed")


def killed_sometime(folder: Path, wait: float) -> None:
    """A child that is killed `wait` seconds after it has written a state of its own."""
    before = set(folder.glob("step-*"))
    child = os.fork()
    if child == 0:
        training(folder)
        os._exit(0)
    while not set(folder.glob("step-*")) - before and not os.waitpid(child, os.WNOHANG)[0]:
        time.sleep(0.001)
    time.sleep(wait)
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass  # it was done


if __name__ == "__main__":
    torch.set_num_threads(1)
    import lightning.fabric  # noqa: F401  (once, not in each child)
    import torch.utils.tensorboard

    home = Path(sys.argv[1])
    for kind in ("sgd", "adamw"):
        killed(home / kind, 7, kind)
    for attempt in range(5):
        killed_sometime(home / "sometime", 0.004 * attempt)
