"""What the original says of itself: its licence, where it comes from, its languages.

A Hugging Face folder says so in the header of its README.md, a GGUF in its fields, a hub id by
itself. What it does not say is not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB = re.compile(r"https?://huggingface\.co/([^/\s]+/[^/\s?#]+)/?")
_LICENCE = ("license", "license_name", "license_link")
_WORD = re.compile(r"[A-Za-z0-9][\w.+-]*")


@dataclass(frozen=True)
class Ancestry:
    """licence: an SPDX-like word, "other" with its name. base: a hub id. Empty where unknown."""

    licence: str = ""
    licence_name: str = ""
    licence_link: str = ""
    base: str = ""
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


def ancestry(source: str) -> Ancestry:
    """Of the model that a run began with: a folder, a .gguf file or a hub id."""
    path = Path(source).expanduser()
    try:
        if path.is_file() and path.suffix == ".gguf":
            return _of_gguf(path)
        if path.is_dir():
            return _of_card(path / "README.md", "")
    except OSError:
        return Ancestry()
    if not path.exists() and HUB_ID.fullmatch(source):
        return _of_card(_cached(source), source)
    return Ancestry()


def _of_gguf(path: Path) -> Ancestry:
    from lighten.errors import UserError
    from lighten.gguf_file import read_gguf

    try:
        fields = read_gguf(path).metadata
    except UserError:
        return Ancestry()
    named = {key: fields.get(f"general.{key.replace('_', '.')}") for key in _LICENCE}
    home = fields.get("general.source.repo_url") or fields.get("general.source.url")
    return _said({**named, "language": fields.get("general.languages")}, _hub_id(home))


def _of_card(path: Path | None, base: str) -> Ancestry:
    if path is None or not path.is_file():
        return Ancestry(base=base)
    from huggingface_hub import metadata_load

    try:
        header = metadata_load(path)
    except Exception:  # a header may be damaged in any way: then it says nothing
        header = None
    return _said(header if isinstance(header, dict) else {}, base)


def _cached(hub_id: str) -> Path | None:
    """The README.md of a model on the hub, where it was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "README.md")
    return Path(found) if isinstance(found, str) else None


def _said(header: Mapping[str, Any], base: str) -> Ancestry:
    licence, name = _words(header.get("license")), _one(header.get("license_name"))
    link = _one(header.get("license_link"))
    known = licence[0] if len(licence) == 1 else ""
    return Ancestry(
        known, name if known == "other" else "", link if known == "other" else "", base,
        tuple(_words(header.get("language"))), tuple(_words(header.get("tags"))),
    )  # fmt: skip


def _words(value: Any) -> list[str]:
    """One word or a list of words; what is no plain word is left out."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, str) and _WORD.fullmatch(v)]


def _one(value: Any) -> str:
    return value if isinstance(value, str) and "\n" not in value else ""


def _hub_id(url: Any) -> str:
    found = _HUB.fullmatch(url) if isinstance(url, str) else None
    return found[1] if found and HUB_ID.fullmatch(found[1]) else ""
