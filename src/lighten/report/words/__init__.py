"""What the page says, in each language: one JSON file of keys and sentences for each.

Sentences have places in braces. A phrase is a key and what stands in its places, so that the same
page can be read in another language without being made again.
"""

from __future__ import annotations

import json
import locale
import os
import string
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from lighten.errors import UnknownName

LANGUAGES = {"en": "English", "zh": "中文"}


class Phrase(NamedTuple):
    """A key of the words, and what stands in its places; a value may be a phrase itself."""

    key: str
    places: Mapping[str, Any] = {}


@cache
def words(language: str) -> Mapping[str, str]:
    """Key -> sentence. Raises UnknownName."""
    if language not in LANGUAGES:
        raise UnknownName(f"unknown language `{language}`", f"known: {', '.join(LANGUAGES)}")
    text = files(__name__).joinpath(f"{language}.json").read_text(encoding="utf-8")
    found: dict[str, str] = json.loads(text)
    return found


def say(phrase: Phrase | str, language: str) -> str:
    """A phrase in a language; a key that has no words stands for itself.

    >>> say(Phrase("change.smaller", {"x": "3.4"}), "en")
    '3.4× smaller'
    """
    if isinstance(phrase, str):
        return words(language).get(phrase, phrase)
    places = {
        name: say(value, language) if isinstance(value, Phrase) else str(value)
        for name, value in phrase.places.items()
    }
    template = words(language).get(phrase.key, phrase.key)
    # values are never read as templates, whatever braces they hold
    parts = string.Formatter().parse(template)
    return "".join(
        literal + ("" if name is None else places.get(name, "")) for literal, name, *_ in parts
    )


def language(asked: str | None = None) -> str:
    """`asked`, or that of the locale where it has words, or English. Raises UnknownName."""
    if asked is not None:
        words(asked)
        return asked
    told = next((os.environ[k] for k in ("LC_ALL", "LC_MESSAGES", "LANG") if os.environ.get(k)), "")
    told = told or (locale.getlocale()[0] or "")
    found = told.replace("_", "-").partition("-")[0].lower()
    return found if found in LANGUAGES else "en"
