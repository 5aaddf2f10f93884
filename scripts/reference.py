"""Write what is generated of the docs: the command line, the tables of formats and of losses.

    python scripts/reference.py [--check]

--check changes nothing and exits 1 where a page is not what would be written.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

from lighten.cli import app
from lighten.registry import formats, losses

sys.path.insert(0, str(Path(__file__).resolve().parent))
from generated import main

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"
LOSSES = REFERENCE.parent / "concepts" / "losses.md"
_ROW = 4096
_INT = re.compile(r"int(\d)_(g\d+|channel)(_sym)?")

_HEAD = """\
# Command line

This page is written by `python scripts/reference.py` from the command line itself; a test compares
the two. Standard output is data (a table, or JSON with `--json`), standard error is talk.

| Exit code | Meaning |
|---|---|
| 0 | done |
| 1 | failed (damaged input, no room, a missing package), or the result is worse than a plain baseline |
| 2 | wrong use: an option, a name, a budget that cannot be met, a run begun for another request |
| 130 | stopped by ^C; what is done stays done |
"""  # noqa: E501


@dataclass(frozen=True)
class Parameter:
    """One argument or option of a verb. words: `MODEL`, or `--quiet`, `-q`."""

    words: tuple[str, ...]
    is_argument: bool
    type: str
    default: str
    help: str


def verbs() -> dict[str, tuple[str, list[Parameter]]]:
    """Verb -> (its help, its parameters), read off the functions behind the command line."""
    found = {}
    for command in app.registered_commands:
        function = command.callback
        assert function is not None
        hints = get_type_hints(function, include_extras=True)
        signature = inspect.signature(function).parameters
        parameters = [_parameter(hints[name], p) for name, p in signature.items()]
        found[command.name or function.__name__] = inspect.getdoc(function) or "", parameters
    return found


def _parameter(hint: Any, parameter: inspect.Parameter) -> Parameter:
    kind, about = get_args(hint)
    is_argument = isinstance(about, typer.models.ArgumentInfo)
    # in an Annotated the first name that is given stands where the default would
    given = (d for d in (about.default, *(about.param_decls or ())) if isinstance(d, str))
    named = tuple(given) or (f"--{parameter.name.replace('_', '-')}",)
    words = (str(about.metavar),) if is_argument else named
    default = parameter.default
    shown = "" if default is None or isinstance(default, bool) else f"`{default}`"
    if default is inspect.Parameter.empty:
        shown = "required"
    return Parameter(words, is_argument, _type(kind, about.min), shown, about.help or "")


def _type(kind: Any, low: float | None) -> str:
    plain = next(k for k in (*get_args(kind), kind) if k is not type(None))
    names = {str: "text", int: "integer", float: "number", bool: "switch", Path: "path"}
    return f"{names[plain]}, at least {low}" if low is not None else names[plain]


def command_line() -> str:
    """The page cli.md."""
    parts = [_HEAD]
    for name, (about, parameters) in verbs().items():
        words = [p.words[0] for p in parameters if p.is_argument]
        line = " ".join(("lighten", name, *words, "[OPTIONS]"))
        parts.append(f"## {name}\n\n{about}\n\n    {line}\n")
        table = ["| | Type | Default | |", "|---|---|---|---|"]
        for p in parameters:
            shown = ", ".join(f"`{word}`" for word in p.words)
            table.append(f"| {shown} | {p.type} | {p.default} | {p.help} |")
        parts.append("\n".join(table) + "\n")
    return "\n".join(parts)


def format_tables() -> str:
    """Two tables: GGUF's and plain formats, then the integer groups."""
    lines = ["| Format | Bits per weight | Rows must be a multiple of |", "|---|---|---|"]
    plain = sorted((f.bits(_ROW), n) for n, f in formats.items() if not _INT.fullmatch(n))
    for bits, name in plain:
        block = formats[name].block
        lines.append(f"| `{name}` | {bits:.4g} | {block if block > 1 else 'any length'} |")
    found = [(m, n) for n in formats if (m := _INT.fullmatch(n))]
    groups = sorted({m[2] for m, _ in found}, key=lambda g: (g == "channel", len(g), g))
    lines += ["", f"| Integers (bits per weight) | {' | '.join(groups)} |"]
    lines += ["|---" * (len(groups) + 1) + "|"]
    for bits, symmetric in sorted({(m[1], m[3] or "") for m, _ in found}):
        here = {m[2]: n for m, n in found if (m[1], m[3] or "") == (bits, symmetric)}
        cells = [f"{formats[here[g]].bits(_ROW):.4g}" if g in here else "" for g in groups]
        lines.append(f"| `int{bits}_*{symmetric}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def loss_table() -> str:
    """Loss -> what it is, its options with their defaults, what it needs, its source."""
    lines = [
        "| Loss | | Options | Needs | Least at equality | Source |",
        "|---|---|---|---|---|---|",
    ]
    for name, kind in sorted(losses.items()):
        loss = kind()
        options = [f"`{f.name}={f.default:g}`" if isinstance(f.default, float)
                   else f"`{f.name}={f.default}`" for f in dataclasses.fields(kind)]  # fmt: skip
        needs = [*(["a teacher"] if loss.taught else []), *sorted(loss.needs)]
        least = "not known" if loss.floor is None else f"{loss.floor:g}"
        about = (inspect.getdoc(kind) or "").partition("\n")[0].rstrip(".")
        cells = [f"`{name}`", about, " ".join(options), ", ".join(needs), least, loss.source]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _filled(page: Path, mark: str, table: str) -> str:
    """A page with a table between its two marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(f"<!-- {mark}:begin -->")
    _, _, after = rest.partition(f"<!-- {mark}:end -->")
    return f"{before}<!-- {mark}:begin -->\n{table}\n<!-- {mark}:end -->{after}"


def pages() -> dict[Path, str]:
    """Path -> what it should hold."""
    supported = REFERENCE / "file-formats-supported.md"
    return {
        REFERENCE / "cli.md": command_line(),
        supported: _filled(supported, "formats", format_tables()),
        LOSSES: _filled(LOSSES, "losses", loss_table()),
    }


if __name__ == "__main__":
    sys.exit(main(__doc__, pages))
