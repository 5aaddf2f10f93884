"""Distillation: any student learns from any teacher.

found = lighten.distill(teacher, student, images, learn_from="logits:1,hidden:0.1")
found = lighten.distill(teacher, "half depth, half width", images, test=others)
found.module, found.metrics["after"]

run/student/        the student as it began, where it was made from the teacher
run/tune/           study.db, where temperature and weights are chosen
run/learning/       history.jsonl, TensorBoard, and while it lasts checkpoints
run/model/          the student as it was best: lighten.load(factory, folder)
run/exports/  run/metrics.json
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lighten import distill_request
from lighten.devices import several
from lighten.distill_language import DistilledLanguageModel, distill_language
from lighten.distill_request import Request
from lighten.distill_results import results
from lighten.errors import WrongUse
from lighten.followed_run import FollowedRun, check_processes, follows, led
from lighten.front import is_network
from lighten.learn_state import remove_states
from lighten.lesson import Lesson
from lighten.loaders import check_other
from lighten.look.distillation import look
from lighten.network import Network
from lighten.network_results import verify
from lighten.progress import note, stage
from lighten.recover import BATCH
from lighten.report import kept
from lighten.run import Run
from lighten.stage_log import logged
from lighten.students import Student, StudentSpec, make_student, read_student
from lighten.teach import Hyperparameters, teach
from lighten.tune import SHARE, Report
from lighten.tune import tune as tuned
from lighten.usual_lesson import LOGITS
from lighten.validation import Validation


@dataclass(frozen=True, eq=False)
class Distilled:
    """student: as it was best on held-out data. metrics: what metrics.json holds: "teacher",
    "before" and "after" (sizes, and quality on data that nothing was chosen by), "learning",
    "trials". exported: the file that was asked for."""

    student: Student
    metrics: dict[str, Any]
    folder: Path
    exported: Path | None = None

    @property
    def network(self) -> Network:
        return self.student.network

    @property
    def module(self) -> nn.Module:
        return self.student.network.module

    def save(self, folder: str | Path) -> None:
        """safetensors and a JSON; `lighten.load(factory, folder)` reads them. factory: of the
        teacher, where the student was made from it, else of the student."""
        self.student.save(Path(folder))

    def _repr_html_(self) -> str:
        from lighten.report import notebook

        return notebook.of_result(self.folder, self.metrics)

    def __rich__(self) -> Any:
        from lighten.report.terminal import Glance

        return Glance(self.metrics)


def distill(
    teacher: Any,
    student: Any,
    data: Any,
    *,
    example_inputs: Any = None,
    length: str | None = None,
    learn_from: str | None = None,
    temperature: float | None = None,
    tune: int | None = None,
    test: Any = None,
    evaluate: Callable[[Any], float] | None = None,
    export: str | None = None,
    augment: str | None = None,
    rate: float | None = None,
    batch: int | None = None,
    optimizer: str | None = None,
    patience: int | None = None,
    average: float | None = None,
    mirrored: bool | None = None,
    accumulate: int = 1,
    multiple: int = 1,
    teacher_weights: str | Path | None = None,
    student_weights: str | Path | None = None,
    size: int | None = None,
    mean: Any = None,
    std: Any = None,
    crop: Any = None,
    samples: int | None = None,
    window: int | None = None,
    precision: str = "auto",
    accelerator: str = "auto",
    devices: int | str = 1,
    out: str | Path | None = None,
    seed: int = 0,
) -> Distilled | DistilledLanguageModel:
    """Let `student` learn from `teacher`; it never comes back worse on held-out data.

    teacher: a module, `package.module:factory`, `file.py:factory` or a .pt2 file. student: the
    same; or what it is of its teacher, "half depth, half width" (lighten.students), made from it
    and begun from its weights, or "... from scratch". Neither is changed. data: images at a path, a
    tensor, (inputs, labels) or batches, as for lighten.compress; a part is held out to choose the
    best state by, and another, or `test`, to measure on. learn_from: the lesson, see
    docs/concepts/losses.md, "logits:1" without a word, or "outputs:1" where the teacher's outputs
    are no logits; temperature: of its losses that do not say their own. tune: so many
    short trials choose temperature and weights. evaluate: called with the network, returns what
    counts, higher is better. export: "onnx" beside the weights. augment: "crop+flip" (for images,
    without a word) and what else lighten.course.ImageCourse has. mirrored: the teacher answers with
    the mean over an image and its mirror image (None: where that makes sense, lighten.mirrored).
    samples: inputs that a student is made from the teacher on. multiple: channel counts of such a
    student are multiples of it. For rate, batch, optimizer ("sgd", "adamw", "muon") and what
    follows see lighten.learn. devices: on two, Lightning runs the calling script once more; each
    process gets the result, the first stores it (lighten.followed_run).

    Or both are language models: a Hugging Face folder, a hub id or a .gguf file. student: another
    with the same vocabulary; or "half depth", "8 layers", "half width" (of the feed-forward parts)
    of the teacher. data, test: text (lighten.data.load_text), in windows of `window` tokens (512).
    learn_from: of `logits`, `topk`, `hidden`, `blocks` (where student and teacher are as wide) and
    `labels`, which are the next tokens. samples: windows (64) that a student is made on. batch: in
    windows. Comes back as DistilledLanguageModel, whose `student` is a Model and has no `network`.

    Without a word length is "10epochs", of text "500steps"; batch 128, of text what makes 4096
    tokens; optimizer "sgd", of text "adamw"; samples 1024.

    The same call resumes. Raises UserError for what a person can mend.
    """
    text = not is_network(teacher)
    how = Hyperparameters(
        rate, BATCH if batch is None else batch, optimizer or ("adamw" if text else "sgd"),
        patience, average, mirrored, accumulate=accumulate, precision=precision,
        accelerator=accelerator, devices=devices, seed=seed,
    )  # fmt: skip
    how.check()
    check_other(data, test)
    if text:
        _only_networks(teacher, {
            "example_inputs": example_inputs, "evaluate": evaluate, "augment": augment,
            "mirrored": mirrored, "teacher_weights": teacher_weights,
            "student_weights": student_weights, "size": size, "mean": mean, "std": std,
            "crop": crop, "devices": None if devices == 1 else devices,
        })  # fmt: skip
        return distill_language(
            teacher, student, data, length=length, learn_from=learn_from or LOGITS,
            temperature=temperature, tune=tune, test=test, export=export,
            window=512 if window is None else window, batch=batch, how=how, multiple=multiple,
            samples=64 if samples is None else samples, out=out,
        )  # fmt: skip
    if window is not None:
        raise WrongUse(f"windows of {window} tokens are of text", "the teacher is a network")
    asked = distill_request.read(
        teacher, student, data, example_inputs=example_inputs, length=length or "10epochs",
        learn_from=learn_from, temperature=temperature, trials=tune, test=test, evaluate=evaluate,
        export=export, augment=augment, how=how, multiple=multiple, teacher_weights=teacher_weights,
        student_weights=student_weights, size=size, mean=mean, std=std, crop=crop,
        samples=1024 if samples is None else samples,
    )  # fmt: skip
    # a student made from the teacher is checked again once it is there
    asked.check(asked.student if isinstance(asked.student, Network) else asked.teacher)
    folder = asked.folder if out is None else Path(out)
    if several(how.devices, how.accelerator):
        check_processes(folder)
    opened = FollowedRun.of if follows(folder) else Run.open
    with opened(folder, asked.wanted) as run, logged(run):
        begun = _begun(run, asked)
        asked.check(begun.network)
        validation = Validation(
            asked.teacher,
            begun.network,
            asked.data.held_out,
            asked.data.labels,
            evaluate,
            how.batch,
            logits=not asked.lesson.numbers,
        )
        lesson, trials = _tuned(run, asked, begun.network, validation)
        taught, learning = _taught(run, asked, begun.network, lesson, validation)
        if isinstance(run, FollowedRun):
            run.wait("metrics.json")
        made = replace(begun, network=taught)
        run.file("model", made.save)
        exported = _exported(run, asked, taught)
        metrics = run.json(
            "metrics",
            lambda: results(asked, begun.network, taught, learning, trials, exported),
        )
        if not isinstance(run, FollowedRun):
            look(run, asked)
            kept(folder)
        return Distilled(made, metrics, folder, exported)


def _only_networks(teacher: Any, given: Mapping[str, Any]) -> None:
    """Raises WrongUse where a language model is given what only networks know."""
    for name, value in given.items():
        if value is not None:
            raise WrongUse(
                f"{name} is for networks, and {teacher} is opened as a language model",
                "a network is an nn.Module, package.module:factory or file.py:factory",
            )


# -- stages --------------------------------------------------------------------------------------
def _begun(run: Run, asked: Request) -> Student:
    """The student before it learns; one that is made from the teacher is stored."""
    if not isinstance(asked.student, StudentSpec):
        return Student(asked.student)
    spec, teacher = asked.student, asked.teacher

    @cache
    def made() -> Student:
        return make_student(
            teacher, spec, asked.samples.calibration, multiple=asked.multiple, seed=asked.how.seed
        )

    folder = run.file("student", lambda path: made().save(path))
    # stored after the student: where a kill came between, it is made once more for its notes
    notes = run.json("made", lambda: {"notes": made().network.notes})["notes"]
    return read_student(teacher, folder, notes)


def _tuned(
    run: Run, asked: Request, student: Network, validation: Validation
) -> tuple[Lesson, list[dict[str, Any]]]:
    """The lesson, and the trials that chose it."""
    trials = asked.trials
    if trials is None:
        return asked.lesson, []
    short = asked.length.share(SHARE)

    def learn(lesson: Lesson, report: Report) -> float:
        def judged(module: nn.Module) -> float:
            value = validation(module)
            report(value)
            return value

        _, learned = teach(
            student, asked.teacher, asked.data, lesson, judged, short, asked.how, name="trial"
        )
        return learned.best

    def work() -> dict[str, Any]:
        found = tuned(asked.lesson, trials, learn, run.folder / "tune", asked.how.seed)
        rows = [
            {**row, "value": None if row["value"] is None else validation.shown(row["value"])}
            for row in found.rows
        ]
        return {"lesson": str(found.lesson), "trials": rows}

    stored = run.json("tuned", work)
    note(f"learn from {stored['lesson']}")
    return Lesson.parse(stored["lesson"]), list(stored["trials"])


def _taught(
    run: Run, asked: Request, student: Network, lesson: Lesson, validation: Validation
) -> tuple[Network, dict[str, Any]]:
    """The student after it has learned, and what was learned."""
    folder = run.folder / "learning"
    facts: dict[str, Any] = {}

    def learn() -> Mapping[str, Tensor]:
        with led(run):
            found, learned = teach(
                student, asked.teacher, asked.data, lesson, validation, asked.length, asked.how,
                folder,
            )  # fmt: skip
        facts.update(
            length=str(asked.length), learn_from=str(lesson), rate=asked.how.rate_used,
            steps=learned.steps, best_step=learned.best_step, examples=asked.data.course.count,
            held_out=len(asked.data.held_out), measure=validation.measure,
            before=validation.shown(learned.first), after=validation.shown(learned.best),
            minutes=round(learned.seconds / 60, 2),
        )  # fmt: skip
        run.json("learned", lambda: facts)
        return found.module.state_dict()

    state = run.tensors("taught", learn)
    if not isinstance(run, FollowedRun):
        remove_states(folder)  # what they led to is stored
    taught = student.with_module(copy.deepcopy(student.module))
    taught.module.load_state_dict(state)
    return taught, dict(run.json("learned", lambda: facts))


def _exported(run: Run, asked: Request, taught: Network) -> Path | None:
    """The file that was asked for, opened in its runtime."""
    exporter = asked.exporter
    if exporter is None:
        return None
    suffix = exporter.suffix

    def write(path: Path) -> None:
        exporter.write(taught, path)
        if asked.export == "onnx":
            verify(path, taught, asked.samples.held_out[:8])

    with stage(f"export {asked.export}"):
        return run.file(f"exports/{run.folder.name + suffix if suffix else asked.export}", write)
