"""The coupling view: which channels live and die together, and what is locked for which reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lighten.report.facts import Facts
from lighten.report.units import text, value_of


@dataclass(frozen=True)
class Coupling:
    """free: axes that could be narrowed. locked: reason -> the axes that could not."""

    free: list[dict[str, Any]] = field(default_factory=list)
    locked: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def told(self) -> bool:
        """Whether it is known which layers the axes run through."""
        return any(axis["writers"] or axis["readers"] for axis in self.free)


def coupling(facts: Facts) -> Coupling | None:
    """None where no axes are known; what metrics.json says of widths is the least."""
    axes = facts.rows("axes") or _from_metrics(facts)
    found = Coupling()
    for axis in axes:
        row = _row(axis)
        if axis.get("locked"):
            found.locked.setdefault(str(axis["locked"]), []).append(row)
        else:
            found.free.append(row)
    return found if found.free or found.locked else None


def _row(axis: Mapping[str, Any]) -> dict[str, Any]:
    size, kept = value_of(axis.get("size")), value_of(axis.get("kept"))
    share = value_of(axis.get("macs_share"))
    return {
        "name": str(axis.get("name", "")),
        "size": None if size is None else f"{size:g}",
        "kept": None if kept is None else f"{kept:g}",
        "left": kept / size if size and kept is not None else None,
        "writers": _names(axis.get("writers")),
        "readers": _names(axis.get("readers")),
        "macs_share": "" if share is None else text("share", share),
        "macs_sort": "" if share is None else f"{share:.6g}",
    }


def _names(found: Any) -> list[str]:
    return [str(name) for name in found] if isinstance(found, list) else []


def _from_metrics(facts: Facts) -> list[dict[str, Any]]:
    """What was kept of each axis, without what it was."""
    rows = facts.metrics.get("widths")
    return [
        {"name": row.get("axis"), "kept": row.get("units")}
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict)
    ]
