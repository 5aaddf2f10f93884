"""A student from scratch, half as deep and half as wide: which lessons help it, over three seeds.

    python benchmarks/student/run.py WEIGHTS TRAIN TEST [--epochs 5] [--seeds 3]

ResNet-26 of width 8 learns from ResNet-56 (width 16), or from labels alone. Each epoch shows every
training image once, moved and mirrored in a way that all runs share, so that the teacher looks at
each view only once, beforehand: the lessons here need its outputs alone. 1,000 training images
choose the best state; all test images are measured. A run that is done is kept in result.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

import lighten
from lighten.course import ImageCourse, augmented
from lighten.images import Images, load_images, normalised
from lighten.learn import learn
from lighten.lesson import Lesson
from lighten.progress import stage
from lighten.recover import Judge
from lighten.seeds import generator
from lighten.training_data import TrainingData

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "examples" / "models")]
import cifar_resnet  # noqa: E402
from cifar import NORM, TRAINING, right, trained  # noqa: E402

BATCH = 128
RATE = 0.1
BLOCKS, WIDTH = 4, 8
LESSONS = (
    "labels:1",
    "logits:1:temperature=4",
    "labels:1,logits:1:temperature=4",
    "decoupled:1",
    "labels:1,relations:1:on=outputs",
)


class Views:
    """Every image in `epochs` views; view number e * count + i is of image i. The teacher's outputs
    of a view are looked up, never computed twice."""

    def __init__(self, images: Images, epochs: int, seed: int) -> None:
        self.images, self.epochs, self.seed = images, epochs, seed
        self.pixels, self.labels = images.pixels(), images.labels()
        self.shown: Tensor = torch.empty(0)
        self.outputs: Tensor = torch.empty(0)

    @property
    def count(self) -> int:
        return len(self.pixels) * self.epochs

    def batch(self, indices: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor]:
        self.shown = indices
        rows = indices % len(self.pixels)
        how = self.images.preparation
        moved = torch.cat([self._view(int(i)) for i in indices])
        return normalised(moved, how.mean, how.std), self.labels[rows]

    def teacher(self, _: Tensor) -> Tensor:
        """What the teacher says of the batch that was given last."""
        return self.outputs[self.shown]

    @torch.no_grad()
    def look(self, teacher: lighten.Network) -> None:
        """Let the teacher see all views."""
        found = []
        with stage("the teacher looks", self.count, "views") as tick:
            for part in torch.arange(self.count).split(BATCH):
                inputs, _ = self.batch(part, torch.Generator())
                with torch.autocast("cpu", torch.bfloat16):
                    found.append(teacher.module(inputs).float())
                tick(len(part))
        self.outputs = torch.cat(found)

    def _view(self, index: int) -> Tensor:
        image = self.pixels[index % len(self.pixels)][None]
        return augmented(image, "crop+flip", generator(self.seed, index))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = _stored(args)
    teacher = trained("resnet56", args.weights)
    views = Views(load_images(args.train, limit=TRAINING, **NORM), args.epochs, 0)
    held = load_images(args.train, offset=TRAINING, **NORM)
    test = load_images(args.test, seed=None, **NORM)
    views.look(teacher)
    judge = Judge(teacher, TrainingData(
        ImageCourse(held), held.tensor(), held.labels(), str(args.train), ""
    ))  # fmt: skip
    for lesson in LESSONS:
        for seed in range(args.seeds):
            if any(r["lesson"] == lesson and r["seed"] == seed for r in facts["runs"]):
                continue
            facts["runs"].append(_run(lesson, seed, views, judge, test))
            print(json.dumps(facts["runs"][-1]), flush=True)
            facts["lessons"] = _summary(facts["runs"])
            (HERE / "result.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _run(lesson: str, seed: int, views: Views, judge: Judge, test: Images) -> dict[str, Any]:
    began = time.monotonic()
    torch.manual_seed(seed)
    student = cifar_resnet.ResNet(BLOCKS, WIDTH)
    learn(
        student, views.teacher, Lesson.parse(lesson), views, length="1epochs", rate=RATE,
        batch=BATCH, evaluate=judge, seed=seed, clip=5.0, keep_given=False,
        name=f"{lesson} (seed {seed})",
    )  # fmt: skip
    return {
        "lesson": lesson, "seed": seed, "accuracy": right(student.eval(), test),
        "minutes": round((time.monotonic() - began) / 60, 2),
    }  # fmt: skip


def _summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation by lesson, and the gain over labels alone, seed by seed."""
    labels = {r["seed"]: r["accuracy"] for r in runs if r["lesson"] == "labels:1"}
    rows = []
    for lesson in LESSONS:
        found = {r["seed"]: r["accuracy"] for r in runs if r["lesson"] == lesson}
        both = [found[seed] - labels[seed] for seed in found if seed in labels]
        if found and both:
            rows.append({
                "lesson": lesson, "seeds": len(found), "accuracy": mean(found.values()),
                "deviation": stdev(found.values()) if len(found) > 1 else None,
                "gain": mean(both), "gains": both,
            })  # fmt: skip
    return rows


def _stored(args: argparse.Namespace) -> dict[str, Any]:
    """Runs that are done, where they were as long."""
    path = HERE / "result.json"
    fresh = {"teacher": "ResNet-56", "student": f"ResNet-{6 * BLOCKS + 2}, width {WIDTH}",
             "epochs": args.epochs, "runs": []}  # fmt: skip
    if not path.is_file():
        return fresh
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if found["epochs"] == args.epochs else fresh


if __name__ == "__main__":
    main()
