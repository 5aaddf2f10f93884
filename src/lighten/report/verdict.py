"""A run in a sentence, and what has to be said before it: what got worse than a plain baseline."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lighten.report.glance import apart, rows
from lighten.report.units import ends_of, interval, signed, text, value_of
from lighten.report.words import Phrase, say

RUNTIMES = {"gguf": "llama.cpp", "onnx": "onnxruntime"}

PLAIN = {"uniform", "int8", "w8a8", "w4a8", "w4a4", "w8", "w4"}
"""Plans that anyone could have chosen without a search: one share or one format everywhere."""

_PROBLEMS = {
    r"the output is larger than the input \((.+), (.+)\)": "problem.larger",
    r"the output is slower than the input \((.+), (.+)\)": "problem.slower",
    r"the budget is not met: (\S+) (.+), allowed (.+)": "problem.budget",
}
_BY = (("accuracy", 1), ("evaluate", 1), ("mean_kld", -1), ("relative_error", -1))
"""What plans are compared by: the first that all of them have."""


@dataclass(frozen=True)
class Verdict:
    """problems: what makes the run a failure. warnings: what else got worse than a plain baseline;
    both stand first. gains: parts of the sentence. against: the best plain choice beside it."""

    problems: list[Phrase]
    warnings: list[Phrase]
    gains: list[Phrase]
    against: Phrase | None


def verdict(metrics: Mapping[str, Any], export: str | None = None) -> Verdict:
    """export: what was written, which says in which runtime times were taken."""
    table = {row.key: row for row in rows(metrics)}
    gains: list[Phrase] = []
    for key in ("bytes" if "bytes" in table else "parameters", "macs"):
        found = table.get(key)
        if found and found.change and found.judged != "same":
            word = found.change
            gains.append(word if key == "bytes" else Phrase(f"gain.{key}", {"change": word}))
    speed = next((table[k] for k in ("generate_tokens_per_second", "p50_ms") if k in table), None)
    if speed and speed.change:
        runtime = RUNTIMES.get(export or "", "")
        same = speed.judged == "same"
        inside = Phrase("gain.as_fast") if same else speed.change
        gains.append(
            Phrase("gain.in", {"change": inside, "runtime": runtime}) if runtime else inside
        )
    if quality := _quality(metrics):
        gains.append(quality)
    if not gains and table:
        gains.append(Phrase("gain.none"))
    problems = [_problem(str(p)) for p in metrics.get("problems") or ()]
    against, lost = _against(metrics)
    warnings = [lost] if lost else []
    said = {p.key for p in problems}
    if speed and speed.judged == "worse" and speed.change and "problem.slower" not in said:
        warnings.append(_worse(speed))
    memory = table.get("peak_memory_bytes")
    if memory and memory.judged == "worse":
        warnings.append(_worse(memory))
    return Verdict(problems, warnings, gains, against)


def sentence(found: Verdict, language: str = "en") -> str:
    """The gains as one sentence, and what the plain choice would have given as the next.

    >>> metrics = {"before": {"bytes": 340}, "after": {"bytes": 100}}
    >>> sentence(verdict(metrics))
    '3.4× smaller.'
    """
    if not found.gains:
        return ""
    comma, stop = say("list.comma", language), say("list.stop", language)
    parts = comma.join(say(part, language) for part in found.gains)
    text = parts[:1].upper() + parts[1:] + stop
    if found.against:
        text += say("list.gap", language) + say(found.against, language)
    return text


def _quality(metrics: Mapping[str, Any]) -> Phrase | None:
    after = metrics.get("after")
    if not isinstance(after, Mapping):
        return None
    if (change := value_of(after.get("accuracy_change"))) is not None:
        ends = ends_of(after["accuracy_change"])
        if ends is not None:
            return Phrase("gain.accuracy_within", {
                "x": signed(100 * change),
                "interval": interval("accuracy_change", after["accuracy_change"]),
            })  # fmt: skip
        return Phrase("gain.accuracy", {"x": signed(100 * change)})
    before = metrics.get("before") or {}
    a, b = value_of(before.get("accuracy")), value_of(after.get("accuracy"))
    if a is not None and b is not None:
        return Phrase("gain.accuracy", {"x": signed(100 * (b - a))})
    if (ratio := value_of(after.get("perplexity_ratio"))) is not None:
        shown = signed(100 * (ratio - 1), 1)
        if ends := ends_of(after["perplexity_ratio"]):
            low, high = (signed(100 * (end - 1), 1) for end in ends)
            return Phrase("gain.perplexity_within", {"x": shown, "interval": f"{low} … {high}"})
        return Phrase("gain.perplexity", {"x": shown})
    if "top1_agreement" in after:
        return Phrase("gain.agreement", {"x": text("top1_agreement", after["top1_agreement"])})
    for key in ("evaluate", "mean_kld", "relative_error"):
        if value_of(after.get(key)) is not None:
            name = Phrase(f"row.{key}")
            return Phrase("gain.other", {"name": name, "x": text(key, after[key])})
    return None


def _against(metrics: Mapping[str, Any]) -> tuple[Phrase | None, Phrase | None]:
    """What the best plain plan gives beside the chosen one; and, where it was better, that."""
    plans = [p for p in metrics.get("plans") or () if isinstance(p, Mapping)]
    chosen = next((p for p in plans if p.get("chosen")), None)
    if chosen is None:
        return None, None
    if chosen.get("plan") in PLAIN:
        if len(plans) > 1:
            return None, Phrase("warning.plain", {"plan": Phrase(f"plan.{chosen['plan']}")})
        return None, None
    plain = [p for p in plans if p.get("plan") in PLAIN]
    equal: Phrase | None = None
    for key, better in _BY:
        mine = value_of(chosen.get(key))
        others = [(value_of(p.get(key)), p) for p in plain]
        known = [(v, p) for v, p in others if v is not None]
        if mine is None or not known:
            continue
        theirs, best = max(known, key=lambda pair: better * pair[0])
        places = {
            "plan": Phrase(f"plan.{best['plan']}"), "name": Phrase(f"row.{key}"),
            "ours": text(key, chosen[key]), "theirs": text(key, best[key]),
        }  # fmt: skip
        if better * mine > better * theirs:
            word = "against.better"
            if key == "accuracy":
                places["x"] = signed(100 * (mine - theirs)).lstrip("+")
                word = "against.points"
            # what was measured against the original on the same examples tells plans apart best
            sharp = f"{key}_change" if f"{key}_change" in chosen.keys() & best.keys() else key
            return Phrase(word if _apart(chosen[sharp], best[sharp]) else f"{word}_perhaps",
                          places), None  # fmt: skip
        if mine == theirs:  # what is measured more finely decides
            equal = equal or Phrase("against.equal", places)
            continue
        return None, Phrase("warning.worse_than_plain", places)
    return equal, None


def _apart(a: Any, b: Any) -> bool:
    """Whether two intervals have nothing in common."""
    first, second = ends_of(a), ends_of(b)
    return first is None or second is None or apart(first, second)


def _worse(row: Any) -> Phrase:
    return Phrase("warning.worse", {
        "name": Phrase(f"row.{row.key}"), "before": row.text("before"),
        "after": Phrase("quantity", {"x": row.text("after"), "unit": Phrase(row.unit)})
        if row.unit else row.text("after"), "change": row.change,
    })  # fmt: skip


def _problem(sentence: str) -> Phrase:
    """A problem in the words of the page, where it is one that is known."""
    for pattern, key in _PROBLEMS.items():
        if found := re.fullmatch(pattern, sentence):
            places = dict(zip("abc", found.groups(), strict=False))
            return Phrase(key, places)
    return Phrase("problem.other", {"text": sentence})
