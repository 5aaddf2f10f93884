"""Distillation through its front doors: any student, made students, trials, resuming, mistakes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

pytest.importorskip("lightning", reason="learning needs lightning")

import lighten
from lighten import progress
from lighten.cli import main
from lighten.distill import distill
from lighten.errors import BadInput, BadOutput, ChangedRequest, WrongUse
from lighten.network import Network
from lighten.students import StudentSpec, make_student
from small_networks import SIDE, Plain, images, trained

X = images(160)
CPU: dict[str, Any] = {"accelerator": "cpu", "precision": "32-true"}
QUICK: dict[str, Any] = {"length": "2epochs", "batch": 16, "samples": 40, "augment": "none", **CPU}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


class Deep(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.body = nn.Sequential(*(Block(8) for _ in range(4)))
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def deep(seed: int = 0, classes: int = 5) -> Deep:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Deep(classes).eval()


Y = trained()(X).argmax(1).detach()


@pytest.fixture(autouse=True)
def _as_it_was(one_thread: None) -> Iterator[None]:
    yield
    progress.be_quiet(False)


def test_another_architecture_learns_and_the_run_resumes(tmp_path: Path) -> None:
    student = deep()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    found = distill(trained(), student, (X, Y), learn_from="logits:1,labels:0.5",
                    out=tmp_path / "run", **{**QUICK, "length": "8epochs"})  # fmt: skip
    m = found.metrics
    assert m["learning"][0]["after"] >= m["learning"][0]["before"]
    assert m["after"]["mean_kld"]["value"] < m["before"]["mean_kld"]["value"]
    assert all(torch.equal(student.state_dict()[k], v) for k, v in before.items())
    again = distill(trained(), student, (X, Y), learn_from="logits:1,labels:0.5",
                    out=tmp_path / "run", **{**QUICK, "length": "8epochs"})  # fmt: skip
    assert again.metrics == json.loads((tmp_path / "run" / "metrics.json").read_text()) == m
    loaded = lighten.load(Deep, tmp_path / "run" / "model")
    assert torch.equal(loaded(X), found.module(X))
    with pytest.raises(ChangedRequest, match="length"):
        distill(trained(), student, (X, Y), learn_from="logits:1,labels:0.5",
                out=tmp_path / "run", **QUICK)  # fmt: skip


@pytest.mark.parametrize("spec", ["half depth", "half depth, half width", "half width, scratch"])
def test_a_student_made_from_its_teacher(tmp_path: Path, spec: str) -> None:
    found = distill(deep(), spec, X, out=tmp_path / "run", **QUICK)
    assert found.metrics["after"]["parameters"] < found.metrics["teacher"]["parameters"]
    loaded = lighten.load(deep, tmp_path / "run" / "model")
    assert torch.equal(loaded(X), found.module(X))
    if "depth" in spec:
        assert len(loaded.body) == 2


def test_a_made_student_begins_with_its_teachers_weights() -> None:
    teacher = Network.of(deep(), X[:2])
    made = make_student(teacher, StudentSpec.parse("half depth"), X)
    assert made.blocks == {"body": [0, 3]}
    assert torch.equal(made.network.module.body[1].conv.weight, teacher.module.body[3].conv.weight)


def test_trials_choose_the_lesson_and_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    asked: dict[str, Any] = {"learn_from": "logits:1,labels:0.5", "tune": 3, **QUICK}
    found = distill(trained(), deep(), (X, Y), out=tmp_path / "a", **asked)
    rows = found.metrics["trials"]
    assert len(rows) == 3
    assert rows[0]["lesson"] == "logits:1,labels:0.5"
    assert [row["lesson"] for row in rows if row["chosen"]] == [found.metrics["learn_from"]]
    assert (tmp_path / "a" / "tune" / "study.db").is_file()
    other = distill(trained(), deep(), (X, Y), out=tmp_path / "b", **asked)
    assert [r["lesson"] for r in other.metrics["trials"]] == [r["lesson"] for r in rows]


class Cut:
    """A loader that says that it is longer than it is."""

    def __len__(self) -> int:
        return 9

    def __iter__(self) -> Iterator[Tensor]:
        return iter(X.split(40))


BAD = torch.where(torch.arange(160) == 7, 5, Y)


@pytest.mark.parametrize(
    ("student", "data", "options", "error", "said"),
    [
        (deep(), (X, BAD), {"learn_from": "labels"}, BadInput, "label of example 7 is 5"),
        (deep(classes=4), X, {}, WrongUse, "outputs are"),
        (deep(), X, {"learn_from": "labels"}, WrongUse, "needs labels"),
        (deep(), Cut(), {}, BadInput, "ended after 4 batches, it said it had 9"),
        (deep(), X, {"rate": 1e30, "optimizer": "adamw"}, BadOutput, "step"),
        (deep(), X, {"optimizer": "sdg"}, WrongUse, "optimizer `sdg` is not known"),
        (deep(), X, {"mirrored": True}, WrongUse, "mirrors no image"),
        (
            deep(),
            (X, Y),
            {"learn_from": "labels", "augment": "crop+flip+cutmix"},
            WrongUse,
            "mixes images",
        ),
        (Plain(), X, {"tune": 3, "learn_from": "hidden"}, WrongUse, "nothing to tune"),
        ("most depth", X, {}, WrongUse, "`most` is no share"),
        ("nothing", X, {}, WrongUse, "no student"),
        ("half depth", X, {}, WrongUse, "no repeated blocks"),
    ],
)
def test_a_mistake_is_told(
    tmp_path: Path, student: Any, data: Any, options: dict[str, Any], error: Any, said: str
) -> None:
    if "tune" in options:
        pytest.importorskip("optuna")
    with pytest.raises(error) as caught:
        distill(trained(), student, data, out=tmp_path / "run", **{**QUICK, **options})
    assert said in str(caught.value)
    assert caught.value.hint


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nets.py").write_text("from small_networks import Plain, Residual\n")
    np.savez(tmp_path / "data.npz", images=X.numpy(), labels=Y.numpy())
    monkeypatch.chdir(tmp_path)
    line = ["distill", "nets.py:Residual", "--student", "nets.py:Plain", "--data", "data.npz",
            "--size", str(SIDE), "--length", "4steps", "--learn-from", "logits:1,hidden:0.1",
            "--augment", "none", "--batch", "16", "--samples", "40", "--out", "run"]  # fmt: skip
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["learning"][0]["steps"] == 4
    assert "| Teacher | Student |" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert main(line) == 0
    assert "before" in capsys.readouterr().out


def test_examples_of_the_guide(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "guides" / "distillation.md"
    monkeypatch.chdir(tmp_path)
    text = (f"Line {i}: the quick fox sees {i * i} birds." for i in range(400))
    (tmp_path / "text.txt").write_text("\n".join(text))
    names: dict[str, Any] = {
        "teacher": deep(), "make_teacher": deep, "student": Plain(), "images": X, "labels": Y,
        "folder": tiny("llama", num_hidden_layers=4, max_position_embeddings=512),
    }  # fmt: skip
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(code.replace("10epochs", "2steps").replace("500steps", "2steps"), names)  # noqa: S102
    assert len(names["small"].body) == 2
    assert names["loaded"].config.num_hidden_layers == 2
