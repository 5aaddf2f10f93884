"""Pruning inside Lightning's and transformers' own trainers: same steps, and resumed the same."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lighten.errors import BadInput, MissingPackage, WrongUse
from lighten.gradual import GradualPruning
from lighten.gradual_shrinking import GradualShrinking
from lighten.lightning_callback import lightning_callback
from lighten.rewind import Rewind
from lighten.trainer_callback import STATE, trainer_callback

pytestmark = pytest.mark.filterwarnings("ignore")  # what the trainers say of their own insides


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))


def data() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(96, 12, generator=g), torch.randint(4, (96,), generator=g)
    return list(zip(x, y, strict=True))


def batch(n: int) -> tuple[Tensor, Tensor]:
    rows = data()
    x, y = zip(*(rows[(8 * n + i) % len(rows)] for i in range(8)), strict=True)
    return torch.stack(x), torch.stack(y)


def parts_of(module: nn.Module) -> list[Any]:
    shrinking = GradualShrinking(module, torch.zeros(2, 12), "0.6 macs", start=2, end=10, every=4)
    pruning = GradualPruning(module, "0.75", start=3, end=18, every=3, criterion="taylor1")
    return [Rewind(module, at=4), pruning, shrinking]  # structure has the last word


def by_hand(steps: int, accumulate: int = 1) -> tuple[nn.Module, list[Any]]:
    """What a plain loop makes of the same batches."""
    module = net()
    parts = parts_of(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for n in range(steps * accumulate):
        x, y = batch(n)
        (F.cross_entropy(module(x), y) / accumulate).backward()
        if (n + 1) % accumulate == 0:
            optimizer.step()
            for part in parts:
                part.step((n + 1) // accumulate, optimizer)
            optimizer.zero_grad()
    return module, parts


def same(module: nn.Module, other: nn.Module) -> bool:
    mine, theirs = module.state_dict(), other.state_dict()
    return all(torch.allclose(mine[k], theirs[k], atol=1e-6) for k in mine)


def fit(
    steps: int, folder: Path, accumulate: int = 1, resume: Path | None = None
) -> tuple[nn.Module, list[Any]]:
    lightning = pytest.importorskip("lightning.pytorch")

    class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = net()

        def training_step(self, given: Any, index: int) -> Tensor:
            # by the step: a resumed Lightning begins its data anew
            x, y = batch(self.global_step * accumulate + index % accumulate)
            return F.cross_entropy(self.network(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    task = Task()
    parts = parts_of(task.network)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=[lightning_callback(*parts)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    batches = torch.utils.data.DataLoader(data(), batch_size=8)
    trainer.fit(task, batches, ckpt_path=None if resume is None else str(resume))
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return task.network, parts


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_does_what_the_loop_does(tmp_path: Path, accumulate: int) -> None:
    module, parts = fit(20, tmp_path, accumulate)
    expected, others = by_hand(20, accumulate)
    assert same(module, expected)
    assert parts[1].share == others[1].share == 0.75
    assert parts[2].finish().cost <= 0.6 * parts[2].whole


def test_lightning_resumes(tmp_path: Path) -> None:
    whole, _ = fit(20, tmp_path)
    fit(9, tmp_path)
    assert torch.load(tmp_path / "9.ckpt", weights_only=True)["callbacks"][
        "lighten_Rewind_GradualPruning_GradualShrinking"
    ]
    again, parts = fit(20, tmp_path, resume=tmp_path / "9.ckpt")
    assert same(again, whole)
    assert parts[1].share == 0.75
    assert parts[0].early  # from before


class Classifier(nn.Module):
    """As transformers' Trainer takes modules."""

    def __init__(self) -> None:
        super().__init__()
        self.network = net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.network(x)
        return {"loss": F.cross_entropy(out, labels), "logits": out}


def run_trainer(
    steps: int, folder: Path, resume: bool = False, callbacks: Any = None
) -> tuple[nn.Module, list[Any]]:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *rest: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = Classifier()
    parts = parts_of(model.network)
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=0.1,
        optim="sgd", optim_args="momentum=0.9", lr_scheduler_type="constant", max_grad_norm=0.0,
        save_steps=9, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    rows = [{"x": x, "labels": y} for x, y in data()]
    made = [trainer_callback(*parts)] if callbacks is None else callbacks(parts)
    trainer = InOrder(model, settings, train_dataset=rows, callbacks=made)
    trainer.train(resume_from_checkpoint=resume or None)
    return model.network, parts


def test_the_trainer_does_what_the_loop_does_and_resumes(tmp_path: Path) -> None:
    module, parts = run_trainer(20, tmp_path / "whole")
    expected, _ = by_hand(20)
    assert parts[1].share == 0.75
    assert same(module, expected)
    run_trainer(9, tmp_path / "half")
    again, parts = run_trainer(20, tmp_path / "half", resume=True)
    assert same(again, module)
    assert parts[0].early
    for file in (tmp_path / "half").glob("checkpoint-*/" + STATE.format("*")):
        file.unlink()
    name = "lighten_Rewind_GradualPruning_GradualShrinking"
    with pytest.raises(BadInput, match=rf"there is no .*{name}\.pt"):
        run_trainer(30, tmp_path / "half", resume=True)


def test_callbacks_of_one_trainer_keep_their_own_states(tmp_path: Path) -> None:
    def apart(parts: list[Any]) -> list[Any]:
        return [trainer_callback(part) for part in parts]

    module, _ = run_trainer(20, tmp_path / "whole")
    run_trainer(9, tmp_path / "half", callbacks=apart)
    again, parts = run_trainer(20, tmp_path / "half", resume=True, callbacks=apart)
    assert same(again, module)
    assert parts[0].early
    assert parts[1].share == 0.75
    with pytest.raises(WrongUse, match=r"two callbacks would write lighten_GradualPruning\.pt"):
        run_trainer(2, tmp_path / "two", callbacks=lambda parts: apart([parts[1], parts[1]]))


class Killed(Exception):
    pass


def learned(folder: Path, stop: int = 99) -> tuple[nn.Module, list[Any]]:
    """By lighten's own loop, with a checkpoint after each step; broken off after step `stop`."""
    pytest.importorskip("lightning")
    from lighten.course import ImageCourse
    from lighten.learn import learn
    from lighten.lesson import Lesson

    module = net()
    parts = parts_of(module)
    x, y = (torch.stack(t) for t in zip(*data(), strict=True))

    def evaluate(student: nn.Module) -> float:
        done = all(part.done for part in parts[1:])
        return float((student(x).argmax(1) == y).float().mean()) if done else -math.inf

    def kill(step: int, steps: int) -> None:
        if step == stop:
            raise Killed

    found = learn(
        module, None, Lesson.parse("labels:1"), ImageCourse(x, y), length="24steps", rate=0.1,
        batch=16, evaluate=evaluate, folder=folder, every=2, save_every=1, seed=3,
        after_step=[*parts, kill], accelerator="cpu",
    )  # fmt: skip
    assert found.best > found.first == -math.inf
    return module, parts


def test_parts_are_hooks_of_our_own_loop_and_resume_with_it(tmp_path: Path) -> None:
    whole, _ = learned(tmp_path / "whole")
    with pytest.raises(Killed):
        learned(tmp_path / "killed", stop=11)
    again, parts = learned(tmp_path / "killed")
    assert same(again, whole)
    assert parts[1].finish() is again
    assert parts[2].finish().cost <= 0.6 * parts[2].whole
    assert parts[0].early


def test_lightning_tells_callbacks_of_other_parts_apart() -> None:
    pytest.importorskip("lightning.pytorch")
    parts = parts_of(net())
    assert len({lightning_callback(part).state_key for part in parts}) == 3
    assert lightning_callback(*parts).state_key == lightning_callback(*parts).state_key


def test_a_callback_needs_something_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WrongUse, match="without anything"):
        trainer_callback()
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(MissingPackage, match="`lightning`"):
        lightning_callback(parts_of(net())[1])


# -- the examples


def example(root: Path, name: str, *words: str | Path) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", root / "examples" / name, *words]
    done = subprocess.run([str(w) for w in command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = (line.rsplit(maxsplit=1) for line in done.stdout.splitlines() if line[0] != "{")
    return {name.strip(): float(v.replace(",", "").rstrip("%")) for name, v in rows}


def test_the_example_of_a_loop(repo_root: Path) -> None:
    found = example(repo_root, "prune_in_loop.py")
    assert found["what is left"] <= 0.5 * found["multiply-adds"]
    assert found["masked"] == found["cut"] > 90


def test_the_example_of_lightning(repo_root: Path) -> None:
    pytest.importorskip("lightning")
    found = example(repo_root, "prune_with_lightning.py")
    assert found["zeros"] == 90
    assert found["accuracy"] > 75
    assert found["bytes"] < 0.25 * 2 * 14_480  # of 14,480 weights in f16


def test_the_example_of_the_trainer(repo_root: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    root = repo_root / "examples" / "prune_with_trainer.py"
    command = [sys.executable, "-W", "ignore", root, "--out", tmp_path]
    done = subprocess.run([str(w) for w in command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "50.0% of 14 weights" in done.stdout
    assert float(done.stdout.split("right")[1].split("%")[0]) > 95
    from safetensors.torch import load_file

    weight = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert int((weight.view(-1, 4) == 0).sum(1).min()) == 2


def test_examples_are_short(repo_root: Path) -> None:
    for path in (repo_root / "examples").glob("prune_*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60
