"""lighten: a trained network and a budget in, the best network that fits out, with the proof.

    import lighten
    result = lighten.compress("org/model", budget="90MB")
    result.exported, result.metrics["after"]

Names are loaded when they are first used: `import lighten` itself loads no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lighten.data import load_text
    from lighten.errors import UserError
    from lighten.inspect import inspect_model
    from lighten.measure import compare, quality
    from lighten.model import Model, open_model
    from lighten.pipeline import Result, compress, export, replan
    from lighten.registry import exporters, families, formats, solvers
    from lighten.types import Budget, Candidate, Compressed, Layer, Plan, Spec, Stats

_HOME = {
    "compress": "pipeline", "export": "pipeline", "replan": "pipeline", "Result": "pipeline",
    "open_model": "model", "Model": "model", "inspect_model": "inspect", "load_text": "data",
    "quality": "measure", "compare": "measure", "UserError": "errors",
    "formats": "registry", "solvers": "registry", "exporters": "registry", "families": "registry",
    "Budget": "types", "Candidate": "types", "Compressed": "types", "Layer": "types",
    "Plan": "types", "Spec": "types", "Stats": "types",
}  # fmt: skip

__all__ = [
    "Budget",
    "Candidate",
    "Compressed",
    "Layer",
    "Model",
    "Plan",
    "Result",
    "Spec",
    "Stats",
    "UserError",
    "compare",
    "compress",
    "export",
    "exporters",
    "families",
    "formats",
    "inspect_model",
    "load_text",
    "open_model",
    "quality",
    "replan",
    "solvers",
]


class _Face(ModuleType):
    """Importing `lighten.formats`, the folder, would put it in the place of the registry."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lighten' has no attribute `{name}`")
    return getattr(import_module(f"lighten.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
