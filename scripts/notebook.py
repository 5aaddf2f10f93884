"""Write examples/cifar10.ipynb from examples/cifar10.py.

    python scripts/notebook.py [--check]

The script's docstring becomes the heading, its functions one cell, and the body of `steps` a cell
for each comment at its margin, which is the text above it. No outputs are kept. --check changes
nothing and exits 1 where the notebook is not what would be written.
"""

from __future__ import annotations

import ast
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from generated import main

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
STEPS = "steps"
"""The function whose body is told step by step."""

OUTSIDE = {"main", STEPS}
"""Functions that a notebook has no use for."""

SETTINGS = 'args = parser().parse_args(["--quick"])'


def notebook(script: Path) -> dict[str, Any]:
    """The notebook as JSON, format 4.5."""
    source = script.read_text(encoding="utf-8")
    tree = ast.parse(source)
    head, _, about = (ast.get_docstring(tree) or script.stem).partition("\n")
    about = about.partition("cifar10.ipynb is")[0]
    setting: list[str] = []
    functions: list[str] = []
    steps: ast.FunctionDef | None = None
    for node in tree.body[1:]:
        if isinstance(node, ast.FunctionDef):
            if node.name == STEPS:
                steps = node
            elif node.name not in OUTSIDE:
                functions.append(_text(source, node))
        elif isinstance(node, ast.ImportFrom) and node.module == "__future__":
            continue
        elif not isinstance(node, ast.If) and _wanted(source, node):
            gap = "" if source.splitlines()[node.lineno - 2].strip() else "\n"
            text = _text(source, node).replace("__file__", f'"{script.name}"')
            setting.append((gap if setting else "") + text)
    if steps is None:
        raise SystemExit(f"{script.name} has no function `{STEPS}`")
    cells = [
        _prose(f"# {head.rstrip('.')}\n\n{_indented_as_code(about.strip())}"),
        _code("\n".join(setting)),
        _prose("What the steps below use: a row of the table, the images, and the settings."),
        _code("\n\n\n".join(functions)),
        _prose(
            "The settings, as on the command line. `--quick` takes a few images, so that all of"
            " this runs in a minute; without it, all of them."
        ),
        _code(SETTINGS, tags=["parameters"]),
        *_told(source, steps),
    ]
    for i, cell in enumerate(cells):
        cell["id"] = f"cell-{i}"
    return {
        "cells": cells,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _told(source: str, steps: ast.FunctionDef) -> list[dict[str, Any]]:
    """The body of a function: comments at its margin as text, what follows each as code."""
    first = steps.body[1] if ast.get_docstring(steps) else steps.body[0]
    lines = source.splitlines()
    start = first.lineno - 1
    while lines[start - 1].lstrip().startswith("#"):
        start -= 1
    cells: list[dict[str, Any]] = []
    words: list[str] = []
    code: list[str] = []

    def flush() -> None:
        if words:
            cells.append(_prose(" ".join(words)))
        if "".join(code).strip():
            cells.append(_code("\n".join(code).strip("\n")))
        words.clear()
        code.clear()

    for line in textwrap.dedent("\n".join(lines[start : steps.end_lineno])).splitlines():
        if line.startswith("#"):
            if code:
                flush()
            words.append(line.lstrip("# "))
        else:
            code.append(line)
    flush()
    return cells


def _wanted(source: str, node: ast.stmt) -> bool:
    """Whether it is more than an import that only the command line has a use for."""
    if not isinstance(node, ast.Import):
        return True
    names = {a.asname or a.name for a in node.names}
    used: set[str] = set()
    for other in ast.parse(source).body:
        if not isinstance(other, ast.If) and getattr(other, "name", "") != "main":
            used |= {n.id for n in ast.walk(other) if isinstance(n, ast.Name)}
    return bool(names & used)


def _text(source: str, node: ast.stmt) -> str:
    return ast.get_source_segment(source, node) or ""


def _indented_as_code(text: str) -> str:
    """Lines that are commands as a block of code."""
    words, commands = [], []
    for line in text.splitlines():
        (commands if line.startswith("python ") else words).append(line)
    block = "```bash\n" + "\n".join(commands) + "\n```\n\n" if commands else ""
    return block + "\n".join(words).strip()


def _prose(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": "", "metadata": {}, "source": _lines(text)}


def _code(text: str, tags: list[str] | None = None) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": "",
        "metadata": {"tags": tags} if tags else {},
        "outputs": [],
        "source": _lines(text),
    }


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def pages() -> dict[Path, str]:
    """Path -> what it should hold."""
    made = notebook(EXAMPLES / "cifar10.py")
    return {EXAMPLES / "cifar10.ipynb": json.dumps(made, indent=1, ensure_ascii=False) + "\n"}


if __name__ == "__main__":
    sys.exit(main(__doc__, pages))
