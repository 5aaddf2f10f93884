"""What a run hands back, and how it shows itself in a notebook and in a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.types import Plan


@dataclass(frozen=True)
class Result:
    """What a run has made. metrics: what `metrics.json` holds. exported: the file or folder.

    module: of a network, the smaller torch.nn.Module, before any rounding.
    """

    run: Path
    exported: Path
    plan: Plan
    metrics: dict[str, Any]
    module: Any = None

    def _repr_html_(self) -> str:
        from lighten.report import notebook

        return notebook.of_result(self.run, self.metrics)

    def __rich__(self) -> Any:
        from lighten.report.terminal import Glance

        return Glance(self.metrics)
