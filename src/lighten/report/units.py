"""How a quantity is written for a person: three digits that count, and its unit.

A quantity is a number or {"value", "low", "high"}. Units that every language writes alike stand in
the text; the others (`points`, `tokens/s`) are keys of the words, see `unit`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NBSP = "\u00a0"
_MINUS = "−"
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
_SHARES = ("agreement", "accuracy", "share", "relative_error")
_UNITS = {
    "accuracy_change": "unit.points",
    "bits_per_weight": "unit.bits",
    "bits": "unit.bits",
    "examples_per_second": "unit.examples_per_second",
}


def value_of(quantity: Any) -> float | None:
    """The number of a quantity; None where it is none, or not finite."""
    if isinstance(quantity, Mapping):
        quantity = quantity.get("value")
    if isinstance(quantity, bool) or not isinstance(quantity, (int, float)):
        return None
    return float(quantity) if math.isfinite(quantity) else None


def ends_of(quantity: Any) -> tuple[float, float] | None:
    """The interval of a quantity; None where it has none."""
    if not isinstance(quantity, Mapping):
        return None
    low, high = value_of(quantity.get("low")), value_of(quantity.get("high"))
    return None if low is None or high is None else (low, high)


def text(key: str, quantity: Any) -> str:
    """The value with its unit, where that is no word.

    >>> text("bytes", 79_997_248), text("p50_ms", 1.638), text("accuracy", 0.9339)
    ('80.0\\xa0MB', '1.64\\xa0ms', '93.4\\xa0%')
    >>> text("macs", 125_485_696), text("accuracy_change", -0.0255), text("mean_kld", 2.6e-5)
    ('125\\xa0M', '−2.55', '2.60×10⁻⁵\\xa0nats')
    """
    value = value_of(quantity)
    return "–" if value is None else _one(key, value, _decimals(quantity))


def shown(key: str, value: Any) -> str:
    """Any plain value: a number in the unit that its key names, a count in full, nothing for None.

    >>> shown("bytes", 1_893_496), shown("kept", 1200), shown("axis", "conv1"), shown("x", None)
    ('1.89\\xa0MB', '1,200', 'conv1', '')
    """
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool) and not key.endswith("bytes"):
        return f"{value:,}"
    return str(value) if value_of(value) is None else text(key, value)


def interval(key: str, quantity: Any) -> str:
    """The 95 % interval, without the unit; empty where there is none.

    >>> interval("mean_kld", {"value": 0.0729, "low": 0.0375, "high": 0.1047})
    '0.0375–0.105'
    >>> interval("accuracy_change", {"value": -0.001, "low": -0.003, "high": 0.001})
    '−0.30 … +0.10'
    """
    ends = ends_of(quantity)
    if ends is None:
        return ""
    low, high = (
        _one(key, end, _decimals(quantity)).removesuffix(_suffix(key, end)) for end in ends
    )
    if _suffix(key, ends[0]) != _suffix(key, ends[1]):  # 980 kB to 1.02 MB
        low, high = (_one(key, end, _decimals(quantity)) for end in ends)
    return f"{low} … {high}" if ends[0] < 0 else f"{low}–{high}"


def unit(key: str) -> str:
    """The word key of a unit that is a word; empty where `text` already has it.

    >>> unit("prompt_tokens_per_second"), unit("bytes")
    ('unit.tokens_per_second', '')
    """
    if key.endswith("tokens_per_second"):
        return "unit.tokens_per_second"
    return _UNITS.get(key, "")


def times(ratio: float) -> str:
    """A ratio as it is said.

    >>> times(1.2296), times(3.441), times(12.3)
    ('1.23', '3.4', '12')
    """
    if ratio < 2:
        return f"{ratio:.2f}"
    return f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:,.0f}"


def significant(value: float, digits: int = 3) -> str:
    """Digits that count, without an exponent where a person can do without.

    >>> significant(571.99), significant(0.0728), significant(1234567.4), significant(0)
    ('572', '0.0728', '1,234,567', '0')
    """
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    rounded = round(value, max(0, digits - 1 - size))
    size = math.floor(math.log10(abs(rounded)))
    if size < -4:
        mantissa = f"{value / 10**size:.{digits - 1}f}"
        return f"{mantissa}×10{str(size).translate(_SUPERSCRIPT)}".replace("-", _MINUS)
    return f"{rounded:,.{max(0, digits - 1 - size)}f}".replace("-", _MINUS)


def signed(value: float, decimals: int = 2) -> str:
    """A change with its sign.

    >>> signed(0.2), signed(-0.1, 1)
    ('+0.20', '−0.1')
    """
    shown = f"{value:+.{decimals}f}"
    if float(shown) == 0:
        shown = shown.lstrip("+-")
    return shown.replace("-", _MINUS)


def _one(key: str, value: float, decimals: int) -> str:
    if key.endswith("bytes"):
        return _scaled(value, ("B", "kB", "MB", "GB", "TB"))
    if key in ("parameters", "macs", "tokens", "size"):
        return _scaled(value, ("", "k", "M", "G", "T"))
    if key == "accuracy_change":
        return signed(100 * value)
    if key.endswith(_SHARES):
        return f"{100 * value:.{decimals}f}{NBSP}%".replace("-", _MINUS)
    if key.endswith("ratio"):
        return f"{significant(value, 4)}×"
    return significant(value) + _suffix(key, value)


def _suffix(key: str, value: float) -> str:
    """What stands behind the number, with its blank."""
    if key.endswith("bytes"):
        return NBSP + _scaled(value, ("B", "kB", "MB", "GB", "TB")).partition(NBSP)[2]
    if key.endswith("ratio"):
        return "×"
    if key.endswith(_SHARES):
        return f"{NBSP}%"
    for end, name in (("_ms", "ms"), ("kld", "nats"), ("_db", "dB"), ("seconds", "s")):
        if key.endswith(end):
            return NBSP + name
    return ""


def _decimals(quantity: Any) -> int:
    """Of a share in percent: as many as its interval gives sense to."""
    ends = ends_of(quantity)
    return 2 if ends is not None and ends[1] - ends[0] < 0.02 else 1


def _scaled(value: float, names: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(names) - 1:
        value, power = value / 1000, power + 1
    shown = f"{value:.0f}" if power == 0 else significant(value)
    return f"{shown}{NBSP}{names[power]}".rstrip(NBSP)
