"""Small students and teachers of numbers, as the tests of the loop learn them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lighten.course import ImageCourse
from lighten.learn import Learned, learn
from lighten.lesson import Lesson

CPU: dict[str, Any] = {"accelerator": "cpu", "precision": "32-true"}


def linear(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


INPUTS = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
HELD_OUT = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))


def distance(teacher: nn.Module) -> Any:
    @torch.no_grad()
    def evaluate(module: nn.Module) -> float:
        return -float((module(HELD_OUT) - teacher(HELD_OUT)).square().mean())

    return evaluate


def learned_of(student: nn.Module, teacher: nn.Module, **options: Any) -> Learned:
    asked = {"length": "10epochs", "rate": 0.1, "batch": 16, "evaluate": distance(teacher)} | CPU
    lesson = Lesson.parse(options.pop("lesson", "logits:1"))
    course = options.pop("data", ImageCourse(INPUTS))
    return learn(student, teacher, lesson, course, **(asked | options))


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)
