"""Trainings that Lightning runs in one or two processes, which write what came out.

python learning_in_two.py FOLDER DEVICES STRATEGY:CASE...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from killed_learning import data, network
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lighten.course import ImageCourse
from lighten.errors import UserError
from lighten.front import prune
from lighten.front_recover import recover
from lighten.learn import Hook, learn
from lighten.lesson import Lesson
from lighten.optimizers import grouped
from lighten.weight_masks import WeightMasks


class Steps(nn.Module):
    """A weight in learned steps, its codes a buffer: straight through their rounding."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.step = nn.Parameter(weight.detach().abs().mean() / 2)  # a scalar, which has no shares
        self.codes: Tensor
        self.register_buffer("codes", torch.ones(weight.shape[0], 1, 1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        x = weight * self.codes / self.step
        return (x + (x.round() - x).detach()) * self.step


class Seen:
    """A hook that looks at the student as a module of its own, gradients included."""

    def __init__(self, student: nn.Module) -> None:
        self.student, self.norms, self.began = student, torch.zeros(0), -1

    def __call__(self, step: int, steps: int) -> None:
        self.began = step - 1 if self.began < 0 else self.began
        grads = [p.grad for p in self.student.parameters() if p.grad is not None]
        norm = torch.stack([g.square().sum() for g in grads]).sum()
        self.norms = torch.cat([self.norms, norm[None]])

    def state_dict(self) -> dict[str, Any]:
        return {"norms": self.norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms = state["norms"]


class Stop(Exception):
    pass


def stop_at(last: int) -> Hook:
    def hook(step: int, steps: int) -> None:
        if step == last:
            raise Stop(f"at {last}")

    return hook


def train(folder: Path, devices: int, strategy: str, case: str) -> None:
    home = folder
    student, teacher, held_out = network(4, 1), network(4, 0).eval(), data(5, 32)
    # norms and dropout see each process's own part of a batch: without them both ways are the same
    for module in (student, teacher):
        if not (case == "norms" and module is student):
            module[1] = nn.Identity()  # type: ignore[index, operator, union-attr]
        module[3] = nn.Identity()  # type: ignore[index, operator, union-attr]
    options: dict[str, Any] = {"lesson": "logits:1,hidden:0.1", "rate": 0.05}
    hooks: list[Hook] = []
    penalty: Callable[[], Tensor] | None = None
    if case in ("all", "stopped"):
        first = student[0].weight  # type: ignore[index, operator, union-attr]
        mask = torch.arange(first.numel()).view_as(first) % 3 > 0
        hooks = [WeightMasks(student, {"0.weight": mask}), Seen(student)]
        penalty = lambda: 0.01 * first.square().sum().sqrt()  # noqa: E731
        options |= {"average": 0.7, "clip": 0.05, "accumulate": 2, "optimizer": "adamw",
                    "save_every": 1, "every": 4, "rate": 0.01}  # fmt: skip
        if case == "stopped":
            folder = folder.with_name(folder.name.replace("stopped", "all"))
            hooks = [*hooks, stop_at(6)]
    if case == "parametrized":
        weight = student[0].weight  # type: ignore[index, operator, union-attr]
        parametrize.register_parametrization(student[0], "weight", Steps(weight))  # type: ignore[index, operator]
        student[6].bias.requires_grad_(False)  # type: ignore[index, operator, union-attr]
        options["lesson"] = "logits:1"
    if case == "breaks":
        options |= {"rate": 1e20, "every": 1}
    if case == "given":
        options |= {"rate": 30.0, "keep_given": False, "clip": 100.0}
    kinds = [type(part) for part in student.modules()]
    parameters = list(student.parameters())
    said = ""
    facts: dict[str, Any] = {}
    held: dict[str, int] = {}

    def group(name: str, p: nn.Parameter) -> tuple[float, float]:
        held[name] = (p.to_local() if hasattr(p, "to_local") else p).numel()  # type: ignore[operator]
        return grouped(name, p)

    try:
        learned = learn(
            student, teacher, Lesson.parse(options.pop("lesson")), ImageCourse(data(2, 48)),
            length="12steps", batch=12, folder=folder / "states", precision="32-true",
            evaluate=lambda m: -float((m(held_out) - teacher(held_out)).square().mean()),
            accelerator="cpu", devices=devices, strategy=strategy, penalty=penalty,
            after_step=hooks, group=group, **options,
        )  # fmt: skip
        facts = {"losses": [r["loss"] for r in learned.history if "loss" in r],
                 "best": learned.best, "first": learned.first, "steps": learned.steps,
                 "best_step": learned.best_step}  # fmt: skip
    except (UserError, Stop) as error:
        said = f"{type(error).__name__}: {error}"
    seen = next((h for h in hooks if isinstance(h, Seen)), None)
    facts |= {
        "said": said, "held": held,
        "same_kinds": kinds == [type(part) for part in student.modules()],
        "same_parameters": all(
            a is b for a, b in zip(parameters, student.parameters(), strict=True)
        ),
        "hooks": sum(len(v) for m in student.modules() for k, v in vars(m).items() if "hooks" in k),
        "attributes": sorted({k for m in student.modules() for k in vars(m) if "fsdp" in k}),
        "norms": seen.norms.tolist() if seen else [], "began": seen.began if seen else 0,
    }  # fmt: skip
    write(home, student, facts)


def of_a_graph(folder: Path, devices: int, strategy: str) -> None:
    """A pruned network, which is a graph, learns back."""
    network_, inputs = network(8, 0).eval(), torch.zeros(2, 1, 8, 8)
    network_[1], network_[3] = nn.Identity(), nn.Identity()  # type: ignore[index, operator]
    pruned = prune(network_, inputs, budget="0.6 macs", data=data(2, 48))
    found = recover(
        pruned, network_, inputs, data=data(3, 48), held_out=data(4, 24), length="6steps", rate=0.1,
        batch=12, augment="none", precision="32-true", accelerator="cpu", devices=devices,
        strategy=strategy, folder=folder / "states",
    )  # fmt: skip
    rows = (folder / "states" / "history.jsonl").read_text().splitlines()
    module = found.network.module
    facts = {
        "losses": [json.loads(row)["loss"] for row in rows], "said": "", "norms": [],
        "first": found.metrics["before"], "best": found.metrics["after"],
        "steps": found.metrics["steps"], "best_step": found.metrics["best_step"],
        "same_kinds": not any("FSDP" in type(part).__name__ for part in module.modules()),
        "same_parameters": True, "hooks": 0, "attributes": [],
    }  # fmt: skip
    write(folder, module, facts)


def write(folder: Path, student: nn.Module, facts: dict[str, Any]) -> None:
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    folder.mkdir(parents=True, exist_ok=True)
    save_file(student.state_dict(), folder / f"student-{rank}.safetensors")
    (folder / f"facts-{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[3:]:
        strategy, _, case = argument.partition(":")
        if case == "graph":
            of_a_graph(Path(sys.argv[1]) / argument, int(sys.argv[2]), strategy)
        else:
            train(Path(sys.argv[1]) / argument, int(sys.argv[2]), strategy, case)
