"""A model card beside what a run has exported: README.md, as the hub and people read it.

    write("runs/small")        # -> [runs/small/exports/README.md]

Nothing stands in it that the run has not measured or the original does not say, and no path of the
machine that it was made on.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

from lighten.report.ancestry import Ancestry, ancestry
from lighten.report.card_header import data_name, export_of, header, is_ours
from lighten.report.facts import Facts, of_run
from lighten.report.glance import Row, rows
from lighten.report.page import save
from lighten.report.verdict import RUNTIMES, sentence, verdict
from lighten.report.words import say

NAME = "README.md"
_SIDES = {"distill": ("Teacher", "Student")}
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ESCAPED = re.compile(r"([\\`*_\[\]<>|#])")


def write(run: Path | str) -> list[Path]:
    """Write the cards of a finished run; where they are. None over one that a person has made
    theirs. Raises WrongUse, BadInput, NoRoom."""
    folder = Path(run)
    facts = of_run(folder)
    if not facts.finished:
        return []
    made = []
    came = ancestry(_source(facts))
    places = [folder / "exports"] if facts.exported else []
    if facts.kind == "distill" and (folder / "model").is_dir():
        places.append(folder)  # beside model/
    for place in places:
        if is_ours(place / NAME):
            names = facts.exported if place != folder else ["model"]
            made.append(save(card(facts, came, names), place / NAME))
    return made


def card(facts: Facts, came: Ancestry, names: list[str]) -> str:
    """The text of a card. names: the files and folders beside it."""
    title = _title(facts)
    blocks = [
        header(facts, came, title),
        f"# {md(title)}",
        _first(facts),
        "## Before and after",
        _table(facts),
        _measured(facts),
        "## How to run it",
        *[_use(facts, name) for name in names],
        "## How it was made",
        *_made(facts),
        "## Limits",
        _limits(facts),
        "## Licence",
        _licence(came),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def md(value: object) -> str:
    """Text that Markdown and HTML leave as it is, in one line."""
    return _ESCAPED.sub(r"\\\1", " ".join(str(value).split()))


def code(value: object) -> str:
    """Text as code in a line, whatever it holds."""
    found = " ".join(str(value).split())
    longest = max((len(run) for run in re.findall("`+", found)), default=0)
    ticks = "`" * (longest + 1)
    pad = " " if longest else ""
    return f"{ticks}{pad}{found}{pad}{ticks}"


# -- parts ---------------------------------------------------------------------------------------
def _title(facts: Facts) -> str:
    name = PurePath(facts.model.rpartition(":")[2] or facts.model).name
    for suffix in (".gguf", ".onnx", ".pt2"):
        name = name.removesuffix(suffix)
    return f"{name}, a student of it" if facts.kind == "distill" else f"{name}, compressed"


def _first(facts: Facts) -> str:
    """What got worse, if anything, then the sentence."""
    found = verdict(facts.metrics, facts.export)
    warnings = [f"> **{md(say(p, 'en'))}**" for p in (*found.problems, *found.warnings)]
    return "\n\n".join([*warnings, md(sentence(found))])


def _table(facts: Facts) -> str:
    before, after = _SIDES.get(facts.kind, ("Before", "After"))
    lines = [f"| | {before} | {after} | Change |", "|---|---:|---:|---|"]
    for row in rows(facts.metrics):
        label = say(f"row.{row.key}", "en")
        cells = [label[:1].upper() + label[1:], _cell(row, "before"), _cell(row, "after"),
                 say(row.change, "en") if row.change else ""]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Row, side: str) -> str:
    shown, interval = row.text(side), row.interval(side)
    if row.unit and shown != "–":
        shown += f" {say(row.unit, 'en')}"
    return f"{shown} ({interval})" if interval else shown


def _measured(facts: Facts) -> str:
    metrics = facts.metrics
    lines = []
    data = code(data_name(metrics.get("data")))
    if "tokens" in metrics:
        tokens, windows = metrics["tokens"], metrics.get("windows")
        lines.append(f"Quality: on {tokens:,} tokens in {windows} held-out passages of {data}.")
    elif "examples" in metrics:
        lines.append(f"Quality: on {metrics['examples']:,} held-out examples of {data}.")
    if any(row.interval("after") for row in rows(metrics)):
        lines.append("In brackets: 95 % intervals.")
    runtime = RUNTIMES.get(facts.export)
    machine = facts.part("provenance").get("machine")
    timed = {"p50_ms", "generate_tokens_per_second"} & (metrics.get("after") or {}).keys()
    if runtime and timed and isinstance(machine, Mapping):
        where = machine.get("processor") or machine.get("cpu")
        on = f" on {md(where)}" if where else ""
        lines.append(f"Times and memory: in {runtime}{on}.")
    return " ".join(lines)


def _use(facts: Facts, name: str) -> str:
    # the folder of a student that is a language model is one of transformers
    kind = "huggingface" if facts.of_text and name == "model" else export_of(name)
    quoted = shlex.quote(name)
    if kind == "gguf":
        return f"In llama.cpp and what is built on it:\n\n```bash\nllama-cli -m {quoted}\n```"
    if kind == "onnx":
        shape = [1, *(facts.request.get("inputs") or [[1]])[0][1:]]
        return (
            "In onnxruntime; the first dimension is the batch:\n\n```python\n"
            "import numpy as np\nimport onnxruntime\n\n"
            f"session = onnxruntime.InferenceSession({name!r})\n"
            f"x = np.zeros({tuple(shape)}, np.float32)\n"
            "outputs = session.run(None, {session.get_inputs()[0].name: x})\n```"
        )
    if kind in ("huggingface", "compressed_tensors"):
        more = "" if kind == "huggingface" else " (and `pip install compressed-tensors`)"
        return (
            f"In transformers{more}:\n\n```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({name!r})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({name!r})\n```"
        )
    factory = facts.model.rpartition(":")[2]
    own = facts.kind == "distill" and _DIGEST.fullmatch(str(facts.request.get("student")))
    made = factory if factory.isidentifier() and not own else "make"
    which = "the student" if own else "the network in its full size"
    return (
        f"In PyTorch, where {code(made)} is the function that makes {which}:"
        f"\n\n```python\nimport lighten\n\nmodel = lighten.load({made}, {name!r})\n```"
    )


def _made(facts: Facts) -> list[str]:
    told, request = facts.part("provenance"), facts.request
    versions = told.get("versions")
    version = versions.get("lighten") if isinstance(versions, Mapping) else None
    model = told.get("model")
    given = model.get("digest") if isinstance(model, Mapping) else request.get("model")
    digest = given or request.get("teacher")
    lines = [f"- Made by lighten{f' {md(version)}' if version else ''}"
             f" from {code(_name(facts.model))}."]  # fmt: skip
    if isinstance(digest, str):
        lines.append(f"- SHA-256 of what came in: {code(digest)}.")
    if done := _done(facts):
        lines.append(f"- What was done: {done}.")
    for row in (*_list(facts, "recover"), *_list(facts, "learning")):
        if isinstance(row, Mapping) and row.get("length"):
            length = re.sub(r"(\d)([a-z])", r"\1 \2", str(row["length"]))
            lines.append(f"- It learned for {md(length)} from {code(row.get('learn_from'))}.")
    blocks = ["\n".join(lines)]
    command = told.get("command")
    if isinstance(command, str | list) and command:
        words = shlex.split(command) if isinstance(command, str) else [str(w) for w in command]
        line = shlex.join(_anywhere(word) for word in words)
        blocks.append(f"This line makes the same again:\n\n```bash\n{line}\n```")
    return blocks


def _done(facts: Facts) -> str:
    specs = facts.plan.get("specs")
    parts = []
    if isinstance(specs, Mapping) and specs:
        counts = Counter(str(spec).partition("@")[0] for spec in specs.values())
        kept = counts.pop("keep", 0)
        shown = [f"{n} as {code(name)}" for name, n in counts.most_common()]
        shown += [f"{kept} as they were"] if kept else []
        parts.append(f"layers stored: {', '.join(shown)}")
    widths = facts.plan.get("widths")
    if isinstance(widths, Mapping) and widths:
        parts.append(f"{len(widths)} groups of channels made narrower")
    quantize = facts.request.get("quantize")
    if not specs and quantize not in (None, "auto", "none", "mixed"):
        parts.append(f"quantized to {md(quantize)}")
    if sparsity := facts.request.get("sparsity"):
        parts.append(f"weights pruned to {md(sparsity)}")
    if facts.kind == "distill":
        spec = str(facts.request.get("student"))
        what = "model" if facts.of_text else "network"
        whose = f"another {what}" if _DIGEST.fullmatch(spec) else f"the same {what}, {md(spec)}"
        parts.append(f"it taught a student ({whose})")
    return "; ".join(parts)


def _limits(facts: Facts) -> str:
    lines = [
        "- What the original does wrong, this may do wrong too, and more often.",
        "- Only what stands in the table was measured. Other data, languages and uses may have"
        " suffered more than the averages say.",
    ]
    lines += [f"- {md(note).rstrip('.')}." for note in facts.metrics.get("notes") or ()]
    return "\n".join(lines)


def _licence(came: Ancestry) -> str:
    if came.licence and came.licence != "other":
        return f"That of the original, which says {code(came.licence)}."
    if came.licence_name:
        return f"That of the original, which says {code(came.licence_name)}."
    return (
        "That of the original. What came in does not name it: look there before you pass this on."
    )


# -- small things --------------------------------------------------------------------------------
def _source(facts: Facts) -> str:
    return str(facts.request.get("source") or "") if facts.of_text else ""


def _list(facts: Facts, key: str) -> list[Any]:
    found = facts.metrics.get(key)
    return found if isinstance(found, list) else []


def _name(value: object) -> str:
    """The last part of a path, of whichever system; other words as they are."""
    words = str(value)
    return _anywhere(words) if words.startswith(("/", "\\")) or words[1:3] == ":\\" else words


def _anywhere(word: str) -> str:
    """A word of a command line without the folders of this machine."""
    if PurePosixPath(word).is_absolute() and word != "/":
        return PurePosixPath(word).name
    if PureWindowsPath(word).is_absolute():
        return PureWindowsPath(word).name
    return word
