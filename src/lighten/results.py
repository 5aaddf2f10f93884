"""What a run has to show: before and after, side by side, and what went wrong if anything did."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lighten.model import Model
from lighten.progress import note, stage
from lighten.registry import exporters

_STEP = ("perplexity", "top1_agreement", "mean_kld")
"""What the table of steps shows of each."""

_TEMPORARY = 2_000_000_000
"""Bytes up to which an F16 copy is written only to run the original in llama.cpp."""


def results(
    model: Model, export: str, quality: Mapping[str, Any], exported: Path, predicted: float
) -> dict[str, Any]:
    """{"before", "after"}: quantities by name; "plans": what was measured; "problems", "notes";
    "steps": where something was learned, what was measured before and after it.

    quality: {"chosen": name, name: Quality.as_dict(), ...}, and where something was learned
    "quantized": name of the plan that it began from. predicted: nats.
    """
    chosen = quality["chosen"]
    ours = dict(quality[chosen])
    reference = ours.pop("reference_perplexity")
    size = _size(exported)
    before: dict[str, Any] = {
        "bytes": model.nbytes,
        "bits_per_weight": 8 * model.nbytes / model.parameters,
        "perplexity": reference,
    }
    after: dict[str, Any] = {
        "bytes": size,
        "bits_per_weight": 8 * size / model.parameters,
        **{k: v for k, v in ours.items() if k not in ("windows", "tokens")},
    }
    if export == "gguf":
        after |= speed(exported, model)
        before |= _speed_before(model)
    facts: dict[str, Any] = {
        "before": before,
        "after": after,
        "plan": chosen,
        "predicted_kld": predicted,
        "windows": ours["windows"],
        "tokens": ours["tokens"],
    }
    rows = [
        {"plan": name, "chosen": "yes" if name == chosen else "", **_short(found)}
        for name, found in quality.items()
        if isinstance(found, Mapping)
    ]
    facts["plans"] = rows
    if "quantized" in quality:
        facts["steps"] = _steps(quality)
    facts["notes"] = list(model.notes) + list(exporters[export].notes(model))
    if chosen == "uniform":
        facts["notes"].append(
            "one format everywhere measured better than the allocated plan, so it was taken"
        )
    facts["problems"] = _problems(model, size)
    return facts


def speed(path: Path, model: Model) -> dict[str, Any]:
    """Load time, tokens per second and peak memory in llama.cpp; nothing where it is absent.

    path: a GGUF of `model`, whose context the prompt may fill to a half.
    """
    from lighten.runtimes import llama_cpp

    if not llama_cpp.available():
        return {}
    context = int(getattr(model.config, "max_position_embeddings", 1024))
    prompt, generate = min(512, context // 2), min(64, context // 4)
    with stage(f"time {path.name} in llama.cpp"):
        found = llama_cpp.speed(path, prompt_tokens=prompt, generate_tokens=generate)
    return {
        "load_seconds": found.load_seconds,
        "prompt_tokens_per_second": found.prompt_tokens_per_second,
        "generate_tokens_per_second": found.generate_tokens_per_second,
        "peak_memory_bytes": found.peak_rss_bytes,
    }


def _speed_before(model: Model) -> dict[str, Any]:
    """The same for what came in."""
    from lighten.runtimes import llama_cpp

    if not llama_cpp.available():
        return {}
    with as_gguf(model) as path:
        return {} if path is None else speed(path, model)


@contextmanager
def as_gguf(model: Model) -> Iterator[Path | None]:
    """What came in as llama.cpp opens it: the file itself, or a temporary F16 file of it.

    None where that would be too large to be written only for this.
    """
    exporter = exporters["gguf"]
    if model.kind == "gguf":
        yield model.path
    elif exporter.nbytes(model, {}) > _TEMPORARY:
        note("the original is too large to be written as F16 only to be run in llama.cpp")
        yield None
    else:
        with tempfile.TemporaryDirectory(prefix="lighten-") as folder:
            path = Path(folder) / "original-f16.gguf"
            exporter.write(model, {}, path)
            yield path


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size


def _short(found: Mapping[str, Any]) -> dict[str, Any]:
    return {k: found[k] for k in ("mean_kld", "p99_kld", "top1_agreement") if k in found}


def _steps(quality: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a step; the last is what was exported: one of the two before it."""
    found = {
        "original": {"perplexity": quality[quality["chosen"]]["reference_perplexity"]},
        "quantized": quality[quality["quantized"]],
        "recovered": quality["recovered"],
        "exported": quality[quality["chosen"]],
    }
    return [
        {"step": step, **{key: row[key] for key in _STEP if key in row}}
        for step, row in found.items()
    ]


def _problems(model: Model, size: int) -> list[str]:
    found = []
    if size > model.nbytes:
        sizes = f"{size / 1e6:.1f} MB, {model.nbytes / 1e6:.1f} MB"
        found.append(f"the output is larger than the input ({sizes})")
    return found
