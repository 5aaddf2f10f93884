"""lighten: a trained network and a budget in, the best network that fits out, with the proof.

    import lighten
    result = lighten.compress("org/model", budget="90MB")
    result = lighten.compress(module, example_inputs, budget="0.5 macs", data=loader)
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
    from lighten.distill import distill
    from lighten.errors import UserError
    from lighten.front import compress, load, prune, quantize, write_onnx
    from lighten.front_inspect import inspect
    from lighten.front_recover import recover
    from lighten.measure import compare, quality
    from lighten.model import Model, open_model
    from lighten.network import Network
    from lighten.pipeline import Result, export, replan
    from lighten.prune import Pruned
    from lighten.quantized import Quantized
    from lighten.registry import criteria, exporters, families, formats, losses, solvers
    from lighten.types import Budget, Compressed, Plan, Spec

_HOME = {
    "compress": "front", "prune": "front", "quantize": "front", "load": "front",
    "inspect": "front_inspect", "write_onnx": "front", "Network": "network", "Pruned": "prune",
    "Quantized": "quantized", "criteria": "registry",
    "export": "pipeline", "replan": "pipeline", "Result": "pipeline",
    "open_model": "model", "Model": "model", "load_text": "data",
    "quality": "measure", "compare": "measure", "UserError": "errors",
    "formats": "registry", "solvers": "registry", "exporters": "registry", "families": "registry",
    "Budget": "types", "Compressed": "types", "Plan": "types", "Spec": "types",
    "losses": "registry", "distill": "distill", "recover": "front_recover",
}  # fmt: skip

__all__ = [
    "Budget",
    "Compressed",
    "Model",
    "Network",
    "Plan",
    "Pruned",
    "Quantized",
    "Result",
    "Spec",
    "UserError",
    "compare",
    "compress",
    "criteria",
    "distill",
    "export",
    "exporters",
    "families",
    "formats",
    "inspect",
    "load",
    "load_text",
    "losses",
    "open_model",
    "prune",
    "quality",
    "quantize",
    "recover",
    "replan",
    "solvers",
    "write_onnx",
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
