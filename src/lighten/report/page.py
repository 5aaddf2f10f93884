"""Facts -> one HTML file: sections are filled into templates; charts and words travel as data."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.atomic import no_room
from lighten.errors import WrongUse
from lighten.report import couplings, differences, layer_map, learning, origin, script, tradeoff
from lighten.report.facts import Facts
from lighten.report.glance import Row, rows
from lighten.report.verdict import verdict
from lighten.report.words import LANGUAGES, Phrase, language, say, words

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

MOST_BYTES = 5_000_000
"""What a page may have; charts of single layers go first, then pictures."""

TILES = (
    ("bytes", "parameters"), ("macs",), ("generate_tokens_per_second", "p50_ms"),
    ("accuracy", "evaluate", "perplexity", "mean_kld"), ("peak_memory_bytes",),
    ("top1_agreement",), ("bits_per_weight",),
)  # fmt: skip
"""What is told in large type: of each group the first that was measured, four in all."""


_SIDES = {
    "distill": {"before": "side.teacher", "after": "side.student"},
    "model": {"before": "side.now", "after": "side.least"},
}


def render(facts: Facts, lang: str | None = None) -> str:
    """The page of one run or model as HTML. lang: see words.language. Raises UnknownName."""
    lang = language(lang)
    context = {**_sections(facts), "facts": facts, "title": facts.model, "figures": {}}
    context["figures"] = _figures(context)
    page = fill("page.html", context, lang)
    for part in ("panels", "pictures"):
        if len(page.encode("utf-8", "replace")) <= MOST_BYTES:
            break
        if part == "panels" and context["map"] is not None:
            for panel in context["map"].panels:
                panel["charts"] = {}
        context |= {"left_out": True, **({"pictures": []} if part == "pictures" else {})}
        page = fill("page.html", context, lang)
    return page


def save(page: str, path: Path) -> Path:
    """Write a page, whole or not at all; returns where. Raises NoRoom, WrongUse."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(page.encode("utf-8", "replace"))
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if full := no_room(error, path):
            raise full from error
        hint = "say with --html where else to put it"
        raise WrongUse(f"cannot write {path}: {error.strerror}", hint) from error
    return path


def tiles(table: list[Row]) -> list[Row]:
    """The rows that are told in large type."""
    by = {row.key: row for row in table}
    found = [row for group in TILES if (row := next((by[k] for k in group if k in by), None))]
    still = [row for row in found if row.change is not None and row.change.key == "change.equal"]
    told = [row for row in found if row not in still]
    chosen = [*told, *still][:4]  # what did not change at all is told only where there is room
    return [row for row in found if row in chosen]


def finite(value: Any) -> Any:
    """The same with NaN and infinities as null, which JSON in a browser can say."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, Phrase):
        return [value.key, finite(value.places)]
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def _sections(facts: Facts) -> dict[str, Any]:
    """All that stands on a page, each None or empty where the run has nothing of it."""
    table = rows(facts.metrics)
    # of a model that nothing was done to there is nothing to judge
    judged = verdict({} if facts.kind == "model" else facts.metrics, facts.export)
    keys, steps = learning.steps(facts.metrics)
    return {
        "verdict": judged,
        "sides": _SIDES.get(facts.kind, {s: f"side.{s}" for s in ("before", "after")}),
        "rows": table,
        "tiles": [] if facts.kind == "model" else tiles(table),
        "curve": tradeoff.curve(facts),
        "map": layer_map.layer_map(facts),
        "coupling": couplings.coupling(facts),
        "learnings": learning.learning(facts),
        "told": learning.told(facts.metrics),
        "step_keys": keys,
        "steps": steps,
        "windows": differences.windows(facts),
        "continuation": differences.continuation(facts),
        "pictures": differences.pictures(facts),
        "confusion": differences.confusion(facts),
        "command": origin.command(facts),
        "origin": origin.origin(facts),
        "stages": origin.stages(facts),
        "total": origin.total(facts),
        "left_out": False,
    }


def _figures(context: Mapping[str, Any]) -> dict[str, Any]:
    """Charts by the name of the place where they are drawn."""
    found: dict[str, Any] = {}
    if context["curve"] is not None:
        found |= {f"curve:{key}": f for key, f in context["curve"].figures.items()}
    if context["map"] is not None:
        found |= {f"treemap:{side}": f for side, f in context["map"].treemap.items()}
        if context["map"].blocks is not None:
            found["blocks"] = context["map"].blocks
    for number, made in enumerate(context["learnings"]):
        found[f"loss:{number}"] = made.loss
        if made.held_out is not None:
            found[f"held_out:{number}"] = made.held_out
    if context["confusion"] is not None:
        found |= {f"confusion:{s}": f for s, f in context["confusion"]["figures"].items()}
    return found


def fill(template: str, context: Mapping[str, Any], lang: str) -> str:
    """A template with its context, the words of all languages, the charts and the script."""
    known = {name: words(name) for name in LANGUAGES}
    panels = [] if context.get("map") is None else context["map"].panels
    data = {"words": known, "figures": context["figures"], "panels": panels}
    page: str = _environment().get_template(template).render(
        **context, lang=lang, languages=LANGUAGES, data=finite(data), plotly=script.packed(),
        plotly_version=script.version(), glossary=_glossary(context), Phrase=Phrase,
        say=_Say(lang),
    )  # fmt: skip
    return page


def _glossary(context: Mapping[str, Any]) -> list[str]:
    """The terms of art that this page uses: rows of its table, and what its sections speak of."""
    keys = [row.key for row in context.get("rows") or ()]
    if context.get("map") is not None:
        keys += ["bits", "sensitivity", "error", "sparsity", "rank", "grid", "importance", "range"]
    for section, names in (("curve", ("interval", "predicted", "uniform")),
                           ("coupling", ("axis", "locked")),
                           ("windows", ("token", "mean_kld")),
                           ("confusion", ("confusion",)),
                           ("learnings", ("loss", "held_out", "step"))):  # fmt: skip
        if context.get(section):
            keys += names
    if any(row.interval("after") for row in context.get("rows") or ()):
        keys.append("interval")
    keys += ["digest", "seed"]
    return [key for key in dict.fromkeys(keys) if f"term.{key}" in words("en")]


class _Say:
    """Filters of the templates: a word or phrase as text that the page can put into another
    language, as an attribute, and a term with what it means."""

    def __init__(self, lang: str) -> None:
        self.lang = lang

    def __call__(self, phrase: Phrase | str) -> Markup:
        """In a span that knows its phrase; a string that is no key stands for itself."""
        from markupsafe import Markup

        if isinstance(phrase, str) and phrase not in words("en"):
            return Markup("{}").format(phrase)
        key, places = (phrase, {}) if isinstance(phrase, str) else phrase
        if not places:
            return Markup('<span data-w="{}">{}</span>').format(key, say(phrase, self.lang))
        return Markup('<span data-w="{}" data-p="{}">{}</span>').format(
            key, json.dumps(finite(places), ensure_ascii=False), say(phrase, self.lang)
        )

    def has(self, key: str) -> bool:
        return key in words("en")

    def attribute(self, name: str, phrase: Phrase | str) -> Markup:
        """`name="text"` that follows the language."""
        from markupsafe import Markup

        key, places = (phrase, {}) if isinstance(phrase, str) else phrase
        return Markup('{}="{}" data-w-{}="{}"').format(
            name, say(phrase, self.lang), name, json.dumps([key, finite(places)])
        )

    def term(self, key: str, label: str | None = None) -> Markup:
        """A term of art: its explanation shows on hover, on focus and in the glossary."""
        from markupsafe import Markup

        shown = self(label or f"row.{key}")
        if f"term.{key}" not in words("en"):
            return shown
        return Markup('<span class="term" tabindex="0" data-term="{}">{}</span>').format(key, shown)


def _breakable(name: str) -> Markup:
    """A name that may go on in the next line behind a dot or an underscore."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([._/])(?=[^._/])", r"\1<wbr>", str(escape(name))))


@cache
def _environment() -> Environment:
    """Templates and their scripts out of the package, which may be a zip file."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    folder = files("lighten.report").joinpath("templates")

    def load(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    made = Environment(
        autoescape=True, loader=FunctionLoader(load), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters["breakable"] = _breakable
    made.globals["style"] = Markup(load("report.css"))
    made.globals["behaviour"] = Markup(load("report.js"))
    return made
