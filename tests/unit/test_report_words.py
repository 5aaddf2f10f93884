"""The words of a report in every language, and how its numbers are written."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest

from lighten import report
from lighten.errors import UnknownName
from lighten.report.units import significant, text
from lighten.report.words import LANGUAGES, Phrase, language, say, words


def places(template: str) -> set[str]:
    return {name for _, name, *_ in string.Formatter().parse(template) if name is not None}


def test_languages_have_the_same_words_with_the_same_places() -> None:
    first = words("en")
    for name in LANGUAGES:
        assert words(name).keys() == first.keys()
        assert not [k for k in first if places(first[k]) != places(words(name)[k])]
        assert [k for k, v in words(name).items() if not v] in ([], ["list.gap"])


def test_every_word_that_is_used_is_there() -> None:
    folder = Path(report.__file__).parent
    known = set(words("en"))
    used = set()
    for path in [*folder.rglob("*.py"), *folder.rglob("*.html"), *folder.rglob("*.js")]:
        source = path.read_text(encoding="utf-8")
        groups = "|".join(sorted({key.partition(".")[0] for key in known}))
        used |= set(re.findall(rf'"((?:{groups})\.[a-z_0-9]+(?:\.[a-z]+)?)"', source))
    used = {u for u in used if not u.endswith((".html", ".json", ".css", ".js", ".mean_kld"))}
    assert used <= known | {"row.accuracy"}, used - known


def test_a_phrase_never_reads_a_value_as_a_template() -> None:
    assert say(Phrase("problem.other", {"text": "{x} {0}"}), "en") == "{x} {0}"


def test_the_language_is_the_one_asked_for_or_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert language() == "zh"
    assert language("en") == "en"
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert language() == "en"
    with pytest.raises(UnknownName, match="tlh"):
        language("tlh")


def test_numbers_are_short() -> None:
    assert [significant(v) for v in (0.0, 9.999, 0.00012345, 1e-9, -3.14159)] == [
        "0", "10.0", "0.000123", "1.00×10⁻⁹", "−3.14",
    ]  # fmt: skip
    assert text("bytes", 999_999) == "1.00\u00a0MB"
    assert text("bytes", {"value": None}) == "–"
    assert text("bytes", True) == "–"
