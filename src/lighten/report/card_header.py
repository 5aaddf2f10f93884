"""The YAML header of a model card: what the hub reads.

*Source:* Hugging Face, hub-docs, modelcard.md (the fields) and "Model Cards" (what they mean).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from lighten.report.ancestry import Ancestry
from lighten.report.facts import Facts
from lighten.report.units import value_of

MARK = "# Written by lighten. Without this line it is yours, and is not written again."

LIBRARIES = {
    "gguf": "gguf", "onnx": "onnx", "huggingface": "transformers",
    "compressed_tensors": "transformers", "checkpoint": "lighten",
}  # fmt: skip
_METRICS = (
    ("accuracy", "accuracy", "accuracy"),
    ("perplexity", "perplexity", "perplexity"),
    ("mean_kld", "kl_divergence", "mean KL divergence from the original"),
    ("top1_agreement", "agreement", "same first choice as the original"),
)
"""Key in metrics.json, the hub's type of it, its name."""

_PLAIN = re.compile(r"[A-Za-z][\w/.-]*( [\w/.-]+)*")
_RESERVED = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


def header(facts: Facts, came: Ancestry, title: str) -> str:
    """The header with its two lines of dashes."""
    return "\n".join(["---", MARK, *_yaml(_fields(facts, came, title)), "---"])


def task(facts: Facts) -> str:
    """The hub's name of what it does; empty where that is not known."""
    if facts.of_text:
        return "text-generation"
    after = facts.metrics.get("after") or {}
    pictures = facts.part("differences").get("kind") == "images"
    inputs = facts.request.get("inputs") or [[]]
    square = len(inputs[0]) == 4 and inputs[0][1] in (1, 3)
    return "image-classification" if pictures or ("accuracy" in after and square) else ""


def export_of(name: str) -> str:
    """The exporter that wrote exports/<name>."""
    suffix = PurePath(name).suffix
    return {".gguf": "gguf", ".onnx": "onnx"}.get(suffix, name)


def data_name(source: Any) -> str:
    """What data is called, without the folders of this machine."""
    words = str(source or "")
    in_memory = not words or words.startswith(("a ", "an "))  # such as "a tuple"
    return "data in memory" if in_memory else PurePath(words).name


def _fields(facts: Facts, came: Ancestry, title: str) -> dict[str, Any]:
    own = "huggingface" if facts.of_text else "checkpoint"
    exports = [export_of(name) for name in facts.exported] or [own]
    first = facts.export if facts.export in exports else exports[0]
    licence = {
        "license": came.licence, "license_name": came.licence_name,
        "license_link": came.licence_link,
    }  # fmt: skip
    found: dict[str, Any] = {k: v for k, v in licence.items() if v}
    if came.languages:
        found["language"] = list(came.languages)
    if came.base:
        found["base_model"] = came.base
        if facts.kind == "text":
            found["base_model_relation"] = "quantized"
    found["library_name"] = LIBRARIES.get(first, "lighten")
    if kind := task(facts):
        found["pipeline_tag"] = kind
    found["tags"] = list(dict.fromkeys([*_done(facts), *exports, "lighten"]))
    if results := _results(facts, kind):
        found["metrics"] = [m["type"] for m in results]
        source = data_name(facts.metrics.get("data"))
        dataset = {"type": re.sub(r"\W+", "-", source).strip("-").lower() or "held-out",
                   "name": f"{source}, the part held out"}  # fmt: skip
        found["model-index"] = [
            {"name": title,
             "results": [{"task": {"type": kind}, "dataset": dataset, "metrics": results}]}
        ]  # fmt: skip
    return found


def _done(facts: Facts) -> list[str]:
    """What was done, as tags."""
    if facts.kind == "distill":
        return ["distillation"]
    found = []
    quantize = facts.request.get("quantize")
    if facts.kind == "text" or facts.plan.get("specs") or quantize not in (None, "none", "auto"):
        found.append("quantized")
    if facts.plan.get("widths") or facts.request.get("sparsity"):
        found.append("pruned")
    return found


def _results(facts: Facts, kind: str) -> list[dict[str, Any]]:
    after = facts.metrics.get("after") or {}
    if not kind:
        return []
    rows = [(hub, name, value_of(after.get(key))) for key, hub, name in _METRICS]
    return [
        {"type": hub, "name": name, "value": float(f"{value:.5g}")}
        for hub, name, value in rows
        if value is not None
    ]


def _yaml(value: Any, indent: str = "") -> list[str]:
    """Mappings, lists and scalars as YAML in blocks."""
    lines: list[str] = []
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(inner, Mapping | list):
                deeper = indent + ("  " if isinstance(inner, Mapping) else "")
                lines += [f"{indent}{key}:", *_yaml(inner, deeper)]
            else:
                lines.append(f"{indent}{key}: {_scalar(inner)}")
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, Mapping):
                first, *rest = _yaml(inner, indent + "  ")
                lines += [f"{indent}- {first.strip()}", *rest]
            else:
                lines.append(f"{indent}- {_scalar(inner)}")
    return lines


def _scalar(value: Any) -> str:
    """A scalar as YAML reads it back; a quoted one as JSON, which is YAML too."""
    plain = isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _RESERVED
    return str(value) if plain else json.dumps(value, ensure_ascii=True)


def is_ours(path: Path) -> bool:
    """Whether there is no card yet, or one that nobody has made their own."""
    if not path.exists():
        return True
    with path.open(encoding="utf-8", errors="replace") as file:
        return MARK in [file.readline().rstrip("\n") for _ in range(2)]
