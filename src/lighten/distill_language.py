"""Distillation of language models: a smaller one learns from a larger one, on text.

found = lighten.distill("org/large", "half depth", "text.txt", length="500steps")
found.metrics["before"]["mean_kld"], found.metrics["after"]["mean_kld"]

run/student/        the student as it began, where it was made from the teacher
run/teacher/        the teacher's likeliest tokens, where windows are seen more than once
run/tune/           study.db, where temperature and weights are chosen
run/learning/       history.jsonl, TensorBoard, and while it lasts checkpoints
run/model/          the student as it was best, a Hugging Face folder
run/exports/  run/metrics.json  run/report.html
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lighten import distill_language_request
from lighten.distill_language_request import Request
from lighten.distill_language_results import results
from lighten.errors import WrongUse
from lighten.language_spec import LanguageSpec
from lighten.language_students import make_language_student
from lighten.learn_state import remove_states
from lighten.lesson import Lesson
from lighten.look.language_distillation import look
from lighten.model import Model, open_model
from lighten.preflight import preflight
from lighten.progress import note, stage
from lighten.registry import exporters
from lighten.report import cards, kept
from lighten.run import Run
from lighten.stage_log import logged
from lighten.taught_language_model import School
from lighten.teach import Hyperparameters
from lighten.tune import SHARE, Report
from lighten.tune import tune as tuned
from lighten.verify import opens_in_llama_cpp, verify

STATES = 7
"""Copies of the student in float32 that checkpoints take at most: weights and two moments of
AdamW, twice while one takes the place of the other, and the best state."""


@dataclass(frozen=True, eq=False)
class DistilledLanguageModel:
    """student: as it was best on held-out text, as stored in folder/model. metrics: what
    metrics.json holds: "teacher", "before" and "after" (sizes, and quality on text that nothing was
    chosen by), "learning", "trials". exported: the file that was asked for."""

    student: Model
    metrics: dict[str, Any]
    folder: Path
    exported: Path | None = None

    @property
    def module(self) -> nn.Module:
        """The student as a transformers module, in float32."""
        module = self.student.skeleton()
        self.student.fill(module)
        return module

    def save(self, folder: str | Path) -> None:
        """A Hugging Face folder, its tokenizer beside it: `from_pretrained` reads it."""
        shutil.copytree(self.student.path, Path(folder), dirs_exist_ok=True)

    def _repr_html_(self) -> str:
        from lighten.report import notebook

        return notebook.of_result(self.folder, self.metrics)

    def __rich__(self) -> Any:
        from lighten.report.terminal import Glance

        return Glance(self.metrics)


def distill_language(
    teacher: Any, student: Any, data: Any, *, length: str | None, learn_from: str,
    temperature: float | None, tune: int | None, test: Any, export: str | None, window: int,
    batch: int | None, how: Hyperparameters, multiple: int, samples: int, out: str | Path | None,
) -> DistilledLanguageModel:  # fmt: skip
    """See lighten.distill; batch: windows, None: so many as make 4096 tokens."""
    asked = distill_language_request.read(
        teacher, student, data, length=length, learn_from=learn_from, temperature=temperature,
        trials=tune, test=test, export=export, window=window, batch=batch, how=how,
        multiple=multiple, samples=samples,
    )  # fmt: skip
    folder = asked.folder if out is None else Path(out)
    with Run.open(folder, asked.wanted) as run, logged(run):
        begun, notes = _begun(run, asked)
        made = _taught(run, asked, begun)
        exported = None if asked.export is None else _exported(run, asked.export, made)
        metrics = run.json("metrics", lambda: results(run, asked, begun, made, notes, exported))
        look(run, asked)
        kept(folder)
        return DistilledLanguageModel(made, metrics, folder, exported)


def export(run: str | Path, to: str) -> Path:
    """Write the student of a finished run in another form; returns where. Raises WrongUse."""
    with Run.at(run) as opened:
        if not (opened.whole("metrics.json") and opened.whole("model")):
            raise WrongUse(f"{run} is not finished", "the line that began it goes on")
        path = _exported(opened, to, open_model(opened.path("model")))
        cards(run)
        return path


# -- stages --------------------------------------------------------------------------------------
def _begun(run: Run, asked: Request) -> tuple[Model, list[str]]:
    """The student before it learns; one that is made from the teacher is stored, and how it was."""
    if isinstance(asked.student, Model):
        return asked.student, list(asked.student.notes)
    spec: LanguageSpec = asked.student
    notes: list[str] = []

    def make(path: Path) -> None:
        notes.extend(
            make_language_student(
                asked.teacher, spec, asked.text.learned[: asked.samples], path,
                multiple=asked.multiple, seed=asked.how.seed,
            )
        )  # fmt: skip
        run.json("made", lambda: {"notes": notes})

    folder = run.file("student", make)
    return open_model(folder), list(run.json("made", lambda: {"notes": notes})["notes"])


def _taught(run: Run, asked: Request, begun: Model) -> Model:
    """The student after it has learned, stored as it was stored before."""
    place = run.folder / "learning"

    def write(path: Path) -> None:
        size = 4 * begun.parameters
        memory = 5 * size + 4 * asked.teacher.parameters
        preflight(run.folder, disk=STATES * size + begun.nbytes, memory=memory)
        school = _school(run, asked, begun)
        lesson = _tuned(run, asked, begun, school)
        values, learned = school.teach(begun, lesson, asked.length, asked.how, folder=place)
        facts = {
            "length": str(asked.length), "learn_from": str(lesson), "rate": asked.how.rate_used,
            "steps": learned.steps, "best_step": learned.best_step,
            "examples": len(asked.text.learned),
            "tokens": learned.steps * asked.batch * asked.text.learned.shape[1],
            "held_out": len(asked.text.watched), "measure": school.watched.measure,
            "before": -learned.first, "after": -learned.best,
            "minutes": round(learned.seconds / 60, 2),
        }  # fmt: skip
        run.json("learned", lambda: facts)
        stored = {name: v.to(begun.tensors[name].dtype) for name, v in values.items()}
        exporters["huggingface"].write(begun.with_vectors(stored), {}, path)

    folder = run.file("model", write)
    remove_states(place)  # what they led to is stored
    return open_model(folder)


def _school(run: Run, asked: Request, begun: Model) -> School:
    short = asked.length.share(SHARE)
    planned = asked.steps(asked.length) + (asked.trials or 0) * asked.steps(short)
    with stage("run the teacher"):
        return School.of(
            run, asked.teacher, begun, asked.text.learned, asked.text.watched,
            planned * asked.batch, asked.how.accelerator,
        )  # fmt: skip


def _tuned(run: Run, asked: Request, begun: Model, school: School) -> Lesson:
    """The lesson, chosen by trials where that was asked for."""
    trials = asked.trials
    if trials is None:
        return asked.lesson
    short = asked.length.share(SHARE)

    def learn(lesson: Lesson, report: Report) -> float:
        def judged(module: nn.Module) -> float:
            value = school.watched(module)
            report(value)
            return value

        _, learned = school.teach(begun, lesson, short, asked.how, judged, name="trial")
        return learned.best

    def work() -> dict[str, Any]:
        found = tuned(asked.lesson, trials, learn, run.folder / "tune", asked.how.seed)
        rows = [
            {**row, "value": None if row["value"] is None else -row["value"]} for row in found.rows
        ]
        return {"lesson": str(found.lesson), "trials": rows}

    stored = run.json("tuned", work)
    note(f"learn from {stored['lesson']}")
    return Lesson.parse(stored["lesson"])


def _exported(run: Run, to: str, made: Model) -> Path:
    """A file of the student, opened in its runtime where lighten has one; raises WrongUse."""
    exporter = exporters[to]
    if why := exporter.refuses(made):
        raise WrongUse(f"`{to}` cannot hold this student: {why}", f"it is in {made.path}")
    name = run.folder.name + exporter.suffix if exporter.suffix else to

    def write(path: Path) -> None:
        exporter.write(made, {}, path)
        verify(exporter, made, {}, path)
        if to == "gguf":
            opens_in_llama_cpp(path)

    with stage(f"export {to}"):
        return run.file(f"exports/{name}", write)
