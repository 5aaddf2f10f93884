"""What the registries hold, for `lighten list`."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from lighten import registry
from lighten.errors import UnknownName

_TYPICAL_ROW = 4096
"""Columns for which bits per weight are given; scales of whole rows count by it."""


def kinds() -> dict[str, registry.Registry[Any]]:
    """Folder -> registry, of those that have a folder in this version."""
    every = [r for r in vars(registry).values() if isinstance(r, registry.Registry)]
    folders = {r.folder: r for r in every if r.folder is not None}
    return {f: r for f, r in folders.items() if importlib.util.find_spec(f"lighten.{f}")}


def listing(kind: str | None = None) -> dict[str, list[dict[str, object]]]:
    """Kind -> rows of name and doc; None: every kind. Raises UnknownName.

    Formats say their bits per weight and rows that fit too, exporters what they hold.
    """
    known = kinds()
    if kind is None:
        return {folder: _rows(entries) for folder, entries in known.items()}
    if kind not in known:
        near = difflib.get_close_matches(kind, known, 1)
        guess = f"did you mean `{near[0]}`? " if near else ""
        raise UnknownName(f"unknown kind `{kind}`", f"{guess}known: {', '.join(known)}")
    return {kind: _rows(known[kind])}


def _rows(entries: registry.Registry[Any]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, entry in sorted(entries.items()):
        row: dict[str, object] = {"name": name}
        if entries is registry.formats:
            row["bits_per_weight"] = round(float(entry.bits(_TYPICAL_ROW)), 3)
            row["rows_of"] = f"any multiple of {entry.block}" if entry.block > 1 else "any length"
        if entries is registry.exporters:
            row["holds"] = entry.holds
        row["doc"] = _doc(entry, entries.homes.get(name, ""))
        rows.append(row)
    if entries is registry.formats:
        rows.sort(key=lambda row: (row["bits_per_weight"], row["name"]))
    return rows


def _doc(entry: Callable[..., Any] | object, home: str) -> str:
    """The first line of a function's docstring; of a value, that of the file it comes from."""
    own = entry.__doc__ if isinstance(entry, type) or hasattr(entry, "__code__") else None
    text = own or getattr(sys.modules.get(home), "__doc__", None) or ""
    return text.strip().split("\n")[0]
