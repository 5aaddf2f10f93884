"""Charts as plain plotly JSON: {"data": traces, "layout": layout}.

Two marks are filled in by the page when it draws, so that a chart follows language and theme:
`{w:key}` inside a text is a word, a colour `c:name` is a colour of the theme. Fonts, margins and
the colours of axes come from the page too.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lighten.report.units import value_of
from lighten.report.words import Phrase, words

Figure = dict[str, Any]


def word(key: str) -> str:
    """The mark of a word."""
    return f"{{w:{key}}}"


def colour(name: str) -> str:
    """The mark of a colour of the theme."""
    return f"c:{name}"


def plain(text: object) -> str:
    """Text of others for a place where plotly reads tags.

    >>> plain("<b>a&b")
    '&lt;b&gt;a&amp;b'
    """
    return html.escape(str(text), quote=False)


def axis(title: str, log: bool = False) -> dict[str, Any]:
    """title: with marks."""
    return {"title": {"text": title}, **({"type": "log"} if log else {})}


def rounded(values: Sequence[Any], digits: int = 4) -> list[float | None]:
    """Numbers with the digits that a chart shows; None where one is not finite."""
    return [None if (v := value_of(x)) is None else float(f"{v:.{digits}g}") for x in values]


def scale(largest: float, names: Sequence[str]) -> tuple[float, str]:
    """What to divide by, and what that is called.

    >>> scale(3_400_000, ("B", "kB", "MB"))
    (1000000.0, 'MB')
    """
    power = 0
    while largest >= 1000 and power < len(names) - 1:
        largest, power = largest / 1000, power + 1
    return 1000.0**power, names[power]


def filled(figure: Any, language: str, colours: Mapping[str, str]) -> Any:
    """A figure with its marks filled in, as the page does it."""
    if isinstance(figure, Mapping):
        return {key: filled(value, language, colours) for key, value in figure.items()}
    if isinstance(figure, list):
        return [filled(value, language, colours) for value in figure]
    if not isinstance(figure, str):
        return figure
    if figure.startswith("c:") and figure[2:] in colours:
        return colours[figure[2:]]
    said = words(language)
    return re.sub(r"\{w:([^}]+)\}", lambda m: said.get(m[1], m[1]), figure)


def known(key: str, name: str) -> Phrase | str:
    """The phrase `key.name` where the words have it, else the name itself."""
    return Phrase(f"{key}.{name}") if f"{key}.{name}" in words("en") else name


def marked(key: str, name: str) -> str:
    """The same for a place in a figure."""
    found = known(key, name)
    return word(found.key) if isinstance(found, Phrase) else plain(found)
