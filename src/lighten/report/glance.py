"""The top table: what came in, what came out, and whether that is better or worse.

The page, the terminal and notebooks show the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lighten.report.units import ends_of, interval, signed, text, times, unit, value_of
from lighten.report.words import Phrase

NOISE = 0.05
"""Share by which two timings, or two peaks of memory, of one file may differ."""

EXACT = 0.005

_LOWER, _HIGHER = -1, 1
_ROWS: Sequence[tuple[str, int, float]] = (
    ("bytes", _LOWER, EXACT),
    ("parameters", _LOWER, EXACT),
    ("macs", _LOWER, EXACT),
    ("bits_per_weight", _LOWER, EXACT),
    ("p50_ms", _LOWER, NOISE),
    ("p99_ms", _LOWER, 4 * NOISE),
    ("examples_per_second", _HIGHER, NOISE),
    ("generate_tokens_per_second", _HIGHER, NOISE),
    ("prompt_tokens_per_second", _HIGHER, NOISE),
    ("load_seconds", _LOWER, 2 * NOISE),
    ("peak_memory_bytes", _LOWER, NOISE),
    ("accuracy", _HIGHER, 0.0),
    ("evaluate", _HIGHER, 0.0),
    ("perplexity", _LOWER, 0.0),
    ("mean_kld", _LOWER, 0.0),
    ("p99_kld", _LOWER, 0.0),
    ("top1_agreement", _HIGHER, 0.0),
    ("sqnr_db", _HIGHER, 0.0),
    ("relative_error", _LOWER, 0.0),
)
_PAIRED = {"accuracy": "accuracy_change", "perplexity": "perplexity_ratio"}
"""A quantity -> the change of it that was measured on the same examples."""

QUALITY = (
    "accuracy", "evaluate", "perplexity", "mean_kld", "p99_kld", "top1_agreement", "sqnr_db",
    "relative_error",
)  # fmt: skip
_MINOR = {"p99_ms", "load_seconds", "p99_kld", "sqnr_db", "relative_error", "bits_per_weight"}
_LIKENESS = {"mean_kld", "p99_kld", "top1_agreement", "sqnr_db", "relative_error"}
"""Says how near to the original something is, so that the original has none."""


@dataclass(frozen=True)
class Row:
    """One quantity. ratio: after over before. judged: "better", "worse", "same", or empty where
    there is nothing to compare with. change: the same in words. minor: for a second look.

    key: as in metrics.json; its label is the word `row.<key>`, what it means `term.<key>`.
    """

    key: str
    before: Any
    after: Any
    ratio: float | None
    judged: str
    change: Phrase | None
    minor: bool = False

    def text(self, side: str) -> str:
        """`before` or `after` with a unit that is no word; – where there is none."""
        return text(self.key, self.before if side == "before" else self.after)

    def interval(self, side: str) -> str:
        """The 95 % interval of one side, or empty."""
        return interval(self.key, self.before if side == "before" else self.after)

    @property
    def unit(self) -> str:
        """The word key of the unit, where that is a word."""
        return unit(self.key)


def rows(metrics: Mapping[str, Any]) -> list[Row]:
    """Every quantity that was measured before or after, in the order that a reader wants them."""
    before, after = (_with_rate(metrics.get(side)) for side in ("before", "after"))
    found = []
    for key, better, noise in _ROWS:
        a, b = value_of(before.get(key)), value_of(after.get(key))
        if a is None and b is None:
            continue
        ratio = b / a if a and b is not None else None
        judged, change = _judged(key, better, noise, before, after)
        likeness = key in _LIKENESS
        found.append(
            Row(key, None if likeness else before.get(key), after.get(key),
                None if likeness else ratio, judged, change, key in _MINOR)
        )  # fmt: skip
    return found


def row(metrics: Mapping[str, Any], key: str) -> Row | None:
    """One row of the table, None where it was not measured."""
    return next((r for r in rows(metrics) if r.key == key), None)


def _with_rate(side: Any) -> dict[str, Any]:
    """One side's quantities, and examples a second where the time of one is known."""
    found: dict[str, Any] = dict(side) if isinstance(side, Mapping) else {}
    if time := value_of(found.get("p50_ms")):
        found["examples_per_second"] = 1000 / time
    return found


def _judged(
    key: str, better: int, noise: float, before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[str, Phrase | None]:
    a, b = value_of(before.get(key)), value_of(after.get(key))
    if a is None or b is None or key in _LIKENESS:
        return "", None
    paired = after.get(_PAIRED.get(key, ""))
    if key == "accuracy":
        moved = value_of(paired)
        moved = b - a if moved is None else moved
        shown = Phrase("change.points", {"x": signed(100 * moved)})
        if paired is None and _overlap(before.get(key), after.get(key)):
            return "same", shown
        return _side(better * moved, ends_of(paired), 0.0), shown
    if not a or b / a <= 0:
        return "", None
    if key in QUALITY:
        shown = Phrase("change.percent", {"x": signed(100 * (b / a - 1), 1)})
        return _side(better * (b / a - 1), ends_of(paired), 1.0), shown
    ratio = b / a
    if abs(ratio - 1) <= noise:
        return "same", Phrase("change.same" if noise > EXACT else "change.equal")
    kind = _WORD.get(key, ("fewer", "more"))
    word = kind[0] if ratio < 1 else kind[1]
    judged = "better" if (ratio - 1) * better > 0 else "worse"
    return judged, Phrase(f"change.{word}", {"x": times(max(ratio, 1 / ratio))})


_WORD = {
    "bytes": ("smaller", "larger"),
    "p50_ms": ("faster", "slower"),
    "p99_ms": ("faster", "slower"),
    "load_seconds": ("faster", "slower"),
    "examples_per_second": ("slower", "faster"),
    "generate_tokens_per_second": ("slower", "faster"),
    "prompt_tokens_per_second": ("slower", "faster"),
    "peak_memory_bytes": ("less", "more"),
}


def _overlap(a: Any, b: Any) -> bool:
    """Whether two intervals have something in common."""
    first, second = ends_of(a), ends_of(b)
    return first is not None and second is not None and not apart(first, second)


def apart(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether two intervals have nothing in common."""
    return first[1] < second[0] or second[1] < first[0]


def _side(gain: float, ends: tuple[float, float] | None, zero: float) -> str:
    """Better, worse, or within what the measurement can tell apart."""
    if gain == 0 or (ends is not None and ends[0] <= zero <= ends[1]):
        return "same"
    return "better" if gain > 0 else "worse"
