"""What a distillation of a language model keeps so that it can be looked at: the passages where the
student is furthest from its teacher, and how it is made again."""

from __future__ import annotations

from typing import Any

from lighten.distill_language_request import Request
from lighten.distill_language_results import KLD
from lighten.language_spec import LanguageSpec
from lighten.look import keep
from lighten.look.distillation import words
from lighten.look.language_differences import passages
from lighten.look.provenance import provenance
from lighten.progress import stage
from lighten.run import Run


def look(run: Run, asked: Request) -> None:
    """Store look/*.json of a distillation whose metrics stand."""

    def differences() -> dict[str, Any]:
        kld = run.tensors(KLD, dict)["kld"]
        return {"kind": "text", "windows": passages(asked.teacher.tokenizer, asked.text.measured,
                                                    kld)}  # fmt: skip

    with stage("look"):
        keep(run, "differences", differences)
        keep(run, "provenance", lambda: _provenance(run, asked))


def _provenance(run: Run, asked: Request) -> dict[str, Any]:
    teacher, corpus = asked.teacher, asked.corpus
    return provenance(
        run, words() or _line(asked),
        model={"source": asked.wanted["source"], "digest": teacher.digest, "kind": teacher.kind,
               "parameters": teacher.parameters, "bytes": teacher.nbytes},
        data={"source": corpus.source, "digest": corpus.digest, "bytes": corpus.nbytes},
        seed=asked.how.seed,
    )  # fmt: skip


def _line(asked: Request) -> list[str]:
    """The words of the line that makes a run with this request."""
    student, wanted = asked.student, asked.wanted
    of = str(student).replace(f" of {student.of} ", " ") if isinstance(student, LanguageSpec) else (
        student.source
    )  # fmt: skip
    found = ["lighten", "distill", str(wanted["source"]), "--student", of, "--data",
             asked.corpus.source]  # fmt: skip
    for name in ("length", "learn_from", "tune", "export", "rate", "batch", "optimizer",
                 "patience", "multiple", "window", "samples", "seed"):  # fmt: skip
        if wanted[name] is not None:
            found += [f"--{name.replace('_', '-')}", f"{wanted[name]}"]
    return found
