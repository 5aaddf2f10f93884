"""Ours beside llama.cpp's types at the same file sizes; both measured by llama.cpp.

    python benchmarks/gguf_quality/rescale.py
    python benchmarks/gguf_quality/peer.py CALIBRATION.txt TEST.txt
    python benchmarks/gguf_quality/run.py CALIBRATION.txt --rows IQ2_M IQ4_XS ...

Same model, same 32k calibration tokens, same held-out windows. Each row is compared with the best
llama.cpp type of the same or a smaller size. A row `X pure` puts one type everywhere (the embedding
q8_0, as the peer's pure rows have it), so that encoder and allocator are seen apart. Rows that are
in ours.json already are kept; the run directory resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import peer

from lighten import pipeline
from lighten.allocate import allocate
from lighten.data import load_text
from lighten.language_job import job_of
from lighten.model import open_model
from lighten.registry import exporters
from lighten.run import Run
from lighten.runtimes import llama_cpp
from lighten.solve import Weights, solve
from lighten.types import Plan

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--rows", nargs="+", default=["IQ2_M", "IQ3_S", "IQ4_XS", "Q4_0", "Q4_K_M",
                                                      "Q6_K"])  # fmt: skip
    parser.add_argument("--out", type=Path, default=HERE / "ours.json")
    parser.add_argument("--speed", action="store_true", help="then time all rows in llama.cpp")
    arguments = parser.parse_args()
    cache = peer.cache_dir()
    tools = peer.build_tools(cache)
    base = cache / "smollm2-rescaled-f16.kld"
    theirs = {row["name"]: row for row in json.loads((HERE / "peer.json").read_text())}
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    model = open_model(cache / "smollm2-rescaled")
    corpus, exporter = load_text(arguments.calibration), exporters["gguf"]
    request = {"model": model.digest, "data": corpus.digest, "benchmark": "gguf_quality"}
    with Run.open(cache / "ours", request) as run:
        job = job_of(run, model, corpus, exporter, 64, 512, 0)
        began = time.time()
        candidates = pipeline._candidates(job)
        print(f"candidates {time.time() - began:.0f} s", file=sys.stderr)
        for name in arguments.rows:
            if any(row["name"] == name for row in rows):
                continue
            size = theirs[name]["bytes"]
            if name.endswith(" pure"):
                plan = _pure(model, name.removesuffix(" pure").lower())
            else:
                plan = allocate(candidates, size, exporter.fixed_bytes(model))
            weights, began = Weights(run, model, plan), time.time()
            solve(weights, job.calibration, pipeline._outside(job))
            seconds = time.time() - began
            path = cache / f"ours-{name.lower().replace(' ', '-')}.gguf"
            exporter.write(model, weights, path)
            found: dict[str, Any] = peer.kld(tools, path, base)
            row = {"name": name, "bytes": path.stat().st_size, "bpw": peer.anatomy(path)["bpw"]}
            row |= found | {"solve_seconds": round(seconds, 1)}
            row |= _beside(name, row, theirs)
            rows.append(row)
            arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
            print(json.dumps(row), file=sys.stderr)
    if arguments.speed:
        for row in rows:
            row |= _speeds(row, cache)
            arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


def _beside(name: str, row: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """The peer's row to compare with: its own for pure rows, else the best that is no larger."""
    if name.endswith(" pure"):
        best = theirs[name]
    else:
        # the row's own size is the limit: ours never is larger than that
        limit = theirs[name]["bytes"]
        mixes = [t for t in theirs.values() if t["bytes"] <= limit and t["name"] != "F16"]
        best = min(mixes, key=lambda t: t["kld_mean"])
    return {
        "peer": best["name"],
        "peer_bytes": best["bytes"],
        "peer_kld_mean": best["kld_mean"],
        "ratio": round(row["kld_mean"] / best["kld_mean"], 3),
    }


def _speeds(row: dict[str, Any], cache: Path) -> dict[str, float]:
    """Tokens per second of ours and theirs, in turn; the median of three processes each."""
    ours = cache / f"ours-{row['name'].lower().replace(' ', '-')}.gguf"
    theirs = cache / f"smollm2-rescaled-{row['peer'].lower().replace(' ', '-')}.gguf"
    found = {}
    for key, file in (("", ours), ("peer_", theirs)):
        speed = llama_cpp.speed(file)
        found[f"{key}generate_tokens_per_second"] = round(speed.generate_tokens_per_second, 1)
        found[f"{key}prompt_tokens_per_second"] = round(speed.prompt_tokens_per_second, 1)
    return found


def _pure(model: Any, kind: str) -> Plan:
    outside = {la.name: "q8_0@gptq" for la in model.layers if la.block is None}
    return Plan({la.name: f"{kind}@gptq" for la in model.layers} | outside)


if __name__ == "__main__":
    main()
