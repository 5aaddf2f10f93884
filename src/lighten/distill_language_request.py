"""What a distillation of a language model is asked for: everything opened, read and checked before
anything is learned.

Mistakes are cheap here: another vocabulary, a lesson that needs what is not there, too little text,
a file that cannot hold the student.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from lighten.atomic import dump, file_name
from lighten.data import Corpus, load_text, windows
from lighten.devices import need_lightning
from lighten.errors import BadInput, WrongUse
from lighten.language_spec import LanguageSpec
from lighten.language_students import check_spec
from lighten.length import Length
from lighten.lesson import Lesson
from lighten.measure import fits_context
from lighten.model import Model, open_model
from lighten.registry import exporters
from lighten.sliced_lesson import SlicedLesson
from lighten.students import StudentSpec
from lighten.teach import Hyperparameters
from lighten.tune import check_tunable

MEASURED, WATCHED = 16, 8
"""Windows that are measured on, and that the best state is chosen by."""

TOKENS = 4096
"""In a batch, where no other is asked for."""

RATE, RATE_FRESH = 3e-4, 1e-3
"""Of AdamW, where none is given: for weights that a model comes with, and for drawn ones."""

CLIP = 1.0

_MOST = 10**8
"""Tokens that are read of a text where a length in epochs asks for all of it."""


@dataclass(frozen=True, eq=False)
class Text:
    """Windows (count, length) of token ids, none in two parts: learned from, chosen by, measured
    on. source: what is measured on, as the user wrote it."""

    learned: Tensor
    watched: Tensor
    measured: Tensor
    source: str
    builtin: bool


@dataclass(frozen=True, eq=False)
class Request:
    """student: opened, or what it is of its teacher. samples: windows that a student is made from
    its teacher on. wanted: what another request differs in."""

    teacher: Model
    student: Model | LanguageSpec
    text: Text
    corpus: Corpus
    lesson: Lesson
    length: Length
    trials: int | None
    export: str | None
    how: Hyperparameters
    multiple: int
    samples: int
    wanted: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where the run goes that was given no folder: its own for every request."""
        made = isinstance(self.student, LanguageSpec)
        of = self.teacher if made else self.student
        name = Path(of.source).resolve().name.removesuffix(".gguf")  # type: ignore[union-attr]
        key = sha256(dump(self.wanted).encode()).hexdigest()[:8]
        return Path("runs") / file_name(f"{name}{'-student' if made else ''}-taught-{key}")

    @property
    def batch(self) -> int:
        """Windows in a batch: no more than there are."""
        return min(self.how.batch, len(self.text.learned))

    def steps(self, length: Length) -> int:
        return length.steps(len(self.text.learned) // self.batch)


def read(
    teacher: Any, student: Any, data: Any, *, length: str | None, learn_from: str,
    temperature: float | None, trials: int | None, test: Any, export: str | None, window: int,
    batch: int | None, how: Hyperparameters, multiple: int, samples: int,
) -> Request:  # fmt: skip
    """Read what a user wrote; raises UserError. See lighten.distill. batch: windows; None: so many
    as make TOKENS."""
    need_lightning()
    span, lesson = Length.parse(length or "500steps"), Lesson.parse(learn_from, temperature)
    SlicedLesson.check(lesson, inside=True)
    if trials is not None:
        check_tunable(lesson, trials)
    if window < 2 or samples < 1 or (batch is not None and batch < 1) or how.accumulate < 1:
        raise WrongUse(
            f"windows of {window} tokens, {batch} in a batch, in {how.accumulate} parts, {samples}"
            " to make a student on",
            "windows are at least 2 tokens, all else at least 1",
        )
    if not isinstance(data, str | Path):
        raise WrongUse(
            f"{teacher} is opened as a language model, and the data is a {type(data).__name__}",
            "--data text.txt: a .txt or .jsonl file, or a folder of them",
        )
    batch = max(1, TOKENS // window) if batch is None else batch
    master = open_model(teacher)
    learner = _student(student, master)
    fresh = isinstance(learner, LanguageSpec) and learner.scratch
    usual = RATE_FRESH if fresh else RATE
    how = dataclasses.replace(
        how, batch=batch, clip=CLIP,
        rate=usual if how.rate is None and how.optimizer == "adamw" else how.rate,
    )  # fmt: skip
    if not how.rate_used > 0:
        raise WrongUse(f"a rate of {how.rate_used} cannot be", "such as 0.0003 for adamw")
    corpus = load_text(data)
    other = None if test is None else load_text(test)
    for model in (master, learner):
        if isinstance(model, Model):
            fits_context(model, window, "--window")
    text = _text(corpus, other, master.tokenizer, window, span, batch, how.seed)
    if isinstance(learner, Model):
        _same_words(master, learner, corpus, text, window, how.seed)
    else:
        check_spec(master, learner)
    if export is not None:
        why = exporters[export].refuses(learner if isinstance(learner, Model) else master)
        if why:
            raise WrongUse(f"`{export}` cannot hold this student: {why}", "leave --export out")
    there = Path(teacher).expanduser().exists()
    wanted = {
        "teacher": master.digest,
        "student": str(learner) if isinstance(learner, LanguageSpec) else learner.digest,
        "source": str(master.path.absolute()) if there else str(teacher),
        "learn_from": str(lesson), "length": str(span), "tune": trials, "export": export,
        "multiple": multiple, "data": corpus.digest, "test": other and other.digest,
        "window": window, "samples": samples, **dataclasses.asdict(how), "rate": how.rate_used,
    }  # fmt: skip
    return Request(
        master, learner, text, corpus, lesson, span, trials, export, how, multiple, samples, wanted
    )


def _student(student: Any, teacher: Model) -> Model | LanguageSpec:
    count = len(teacher.blocks)
    if isinstance(student, LanguageSpec):
        return student
    if isinstance(student, StudentSpec):
        return LanguageSpec.of_shares(student, count)
    text = str(student)
    if not Path(text).expanduser().exists() and LanguageSpec.meant(text):
        return LanguageSpec.parse(text, count)
    if not isinstance(student, str | Path):
        raise WrongUse(
            f"the teacher is a language model, the student a {type(student).__name__}",
            'give its folder, hub id or .gguf file, or "half depth" of the teacher',
        )
    try:
        return open_model(student)
    except WrongUse as error:
        raise WrongUse(
            error.message, f'{error.hint}; or say what it is of its teacher, "half depth"'
        ) from error


def _text(
    corpus: Corpus, test: Corpus | None, tokenizer: Any, window: int, length: Length, batch: int,
    seed: int,
) -> Text:  # fmt: skip
    """Raises BadInput where the text ends before there is something of each part."""
    learned = int(length.count) * batch if length.unit == "steps" else _MOST // window
    own = MEASURED if test is None else 0
    found = windows(corpus, tokenizer, window, own + WATCHED + learned, seed)
    if len(found) < 4:
        raise BadInput(
            f"{corpus.source} has {len(found)} windows of {window} tokens: too few to learn from,"
            " to choose by and to measure on",
            "give more text, or a smaller --window",
        )
    own = min(own, max(1, len(found) // 4))
    few = min(WATCHED, max(1, len(found) // 8))
    measured = found[:own] if test is None else windows(test, tokenizer, window, MEASURED, seed)
    measured_in = corpus if test is None else test
    return Text(
        found[own + few :], found[own : own + few], measured, measured_in.source,
        measured_in.builtin,
    )  # fmt: skip


def _same_words(
    teacher: Model, student: Model, corpus: Corpus, text: Text, window: int, seed: int
) -> None:
    """Raises WrongUse where the two do not give probabilities of the same tokens."""
    ours, theirs = (_vocabulary(model) for model in (student, teacher))
    if ours != theirs:
        raise WrongUse(
            f"the student's outputs are over {ours} tokens, the teacher's over {theirs}: they"
            " cannot match",
            "a student of the same family and vocabulary, or one made of its teacher, such as"
            ' "half depth"',
        )
    few = 4
    there, here = (windows(corpus, m.tokenizer, window, few, seed) for m in (teacher, student))
    if there.shape != here.shape or not there.equal(here):
        raise WrongUse(
            f"{student.source} does not split text into the tokens that {teacher.source} does",
            "only models with the same tokenizer can learn token by token; or make the student of"
            ' its teacher, such as "half depth"',
        )


def _vocabulary(model: Model) -> int:
    return next(x.shape[0] for x in model.layers if x.kind in ("head", "embedding+head"))
