"""Learned scales of a language model: what they gain in llama.cpp, at the same bytes.

    python benchmarks/gguf_quality/rescale.py
    python benchmarks/learned_scales/run.py CALIBRATION.txt TEST.txt [--quick]

A copy of SmolLM2 at the sizes of --sizes, first without learning, then with each recipe: the same
plan, the same codes (but for `all`), the same number of bytes; with --even-columns columns are
scaled first. --copy: `rescaled` is that of gguf_quality, `dithered` has its channels as trained.
Mean KL divergence is what llama.cpp's own tool reports on 16 windows of TEST, second halves, which
nothing was learned from. Learning reads CALIBRATION behind the windows that the plan was calibrated
on. A row that is in result.json is kept, and a training that was stopped goes on; --quick writes
no result.json. `minutes` are those of steps, `wall_minutes` all that learning takes, without the
solver and llama.cpp: blocks and head for all recipes that have blocks, which share them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "gguf_quality"))
import dither
import peer

from lighten import pipeline
from lighten.allocate import allocate
from lighten.data import Corpus, load_text
from lighten.even_columns import evened
from lighten.language_blocks import Learning, learn_language_blocks
from lighten.language_job import job_of
from lighten.learned_blocks import FACTS
from lighten.model import open_model
from lighten.progress import note
from lighten.recover_language import BLOCK_STEPS, RATE, TOKENS, WATCHED, Made, lessons, recover
from lighten.registry import exporters
from lighten.run import Run
from lighten.solve import Weights, solve

HERE = Path(__file__).parent
RECIPES: dict[str, dict[str, Any]] = {
    "blocks scales": {"block_mode": "scales", "end": False},
    "blocks, no head": {"block_mode": "all", "end": False, "head": False},
    "blocks": {"block_mode": "all", "end": False},
    "blocks+end": {"block_mode": "all", "mode": "all"},
    "end": {"block_steps": 0, "mode": "scales"},
    "end all": {"block_steps": 0, "mode": "all"},
}
"""What learns, norms always: block by block grids, or codes as well, and then the head, then the
whole with its codes; or only the whole, its grids or its codes as well."""

COPIES = {"rescaled": (peer.MODEL, "smollm2-rescaled"), "dithered": (dither.MODEL, dither.FOLDER)}
"""A copy's file for llama.cpp and its folder, in the cache."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=[90_897_760, 80_000_000])
    parser.add_argument(
        "--recipes", nargs="*", choices=RECIPES, default=["blocks, no head", "blocks", "blocks+end"]
    )
    parser.add_argument("--copy", choices=COPIES, default="rescaled")
    parser.add_argument("--even-columns", action="store_true", help="scale columns first")
    parser.add_argument("--steps", type=int, default=100, help=f"of {TOKENS} tokens")
    parser.add_argument("--block-steps", type=int, default=BLOCK_STEPS, help="of 1024, each block")
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--learn-from", default="logits:1")
    parser.add_argument("--quick", action="store_true", help="the smallest size, 20 steps")
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    arguments = parser.parse_args()
    sizes = [min(arguments.sizes)] if arguments.quick else arguments.sizes
    steps = 20 if arguments.quick else arguments.steps
    out = None if arguments.quick else arguments.out
    rows = json.loads(out.read_text()) if out is not None and out.exists() else []
    cache = peer.cache_dir()
    file, folder = COPIES[arguments.copy]
    if arguments.copy == "dithered":
        dither.dithered(cache)
    tools, base = peer.build_tools(cache), cache / f"{Path(file).stem}.kld"
    if not base.exists():
        peer.kld_base(tools, cache / file, arguments.test, base, chunks=16)
    model, corpus = open_model(cache / folder), load_text(arguments.calibration)
    columns = "even" if arguments.even_columns else "kept"
    request = {"model": model.digest, "data": corpus.digest, "benchmark": "learned_scales",
               "columns": columns}  # fmt: skip
    home = "-".join(["learned", arguments.copy, columns])
    with Run.open(cache / home, request) as run:
        model = evened(run, model) if arguments.even_columns else model
        job = job_of(run, model, corpus, exporters["gguf"], 64, 512, 0)
        candidates = pipeline._candidates(job)
        for size in sizes:
            plan = allocate(candidates, size, job.exporter.fixed_bytes(model))
            weights, began = Weights(run, model, plan), time.time()
            solve(weights, job.calibration, pipeline._outside(job))
            solved = round(time.time() - began)
            plain = Made(plan, weights, model)
            where = {"copy": arguments.copy, "size": size, "columns": columns}
            before = _row(rows, where, "none", plain, lambda made: made, tools, base, out)
            before.setdefault("solve_seconds", solved)
            spent: dict[str, float] = {}
            for row in rows:  # those that are kept came before
                if "wall_minutes" in row and all(row[key] == where[key] for key in where):
                    spent[_shared(row["recipe"])] = row["wall_minutes"]
            for recipe in arguments.recipes:
                name = f"learned/{size}-{RECIPES[recipe].get('block_mode', recipe)}"
                row = _row(
                    rows, where, recipe, plain,
                    lambda made, n=name, r=recipe: _learned(  # type: ignore[misc]
                        run, made, job, corpus, n, steps, arguments, RECIPES[r]
                    ),
                    tools, base, out, spent,
                )  # fmt: skip
                gain = 1 - row["kld_mean"] / before["kld_mean"]
                note(
                    f"{size} {recipe}: {before['kld_mean']:.4f} -> {row['kld_mean']:.4f}"
                    f" ({100 * gain:+.1f} % less), {row.get('wall_minutes', '?')} minutes"
                )


def _learned(
    run: Run, made: Made, job: Any, corpus: Corpus, name: str, steps: int, arguments: Any,
    recipe: dict[str, Any],
) -> Made:  # fmt: skip
    """The plan's weights as learned by a recipe; those of a `block_mode` share their blocks."""
    first = len(job.calibration) + len(job.held_out)
    note(f"learning {name}")
    length = f"{max(steps, 100)}steps"  # no fewer windows for blocks where steps are few

    def text() -> torch.Tensor:
        return lessons(corpus, made.model.tokenizer, 512, first, length)

    given = {"block_steps": arguments.block_steps, **recipe}
    with_head = given.pop("head", True)
    if not given.pop("end", True):
        how = Learning(given["block_steps"], given["block_mode"])
        found = learn_language_blocks(
            run, made.model, made.weights, text()[WATCHED:], how, f"{name}/blocks"
        )
        weights, errors = dict(found.weights), found.errors
        if not with_head:
            left = [la.name for la in made.model.layers if la.block is None and la.name in weights]
            weights |= {name: made.weights[name] for name in left}
            errors = [row for row in errors if row["block"] not in left]
        seconds = sum(row["seconds"] for row in errors)
        facts = {"block_steps": how.steps, "seconds": seconds, "errors": errors}
        model = made.model.with_vectors(found.vectors)
        return Made(made.plan, weights, model, facts)  # type: ignore[arg-type]
    made = recover(
        run, made, text, length=f"{steps}steps", learn_from=arguments.learn_from,
        rate=arguments.rate, folder=name, vectors=torch.float32, **given,
    )  # fmt: skip
    blocks = (made.learned or {}).get("blocks", {})
    facts = dict(made.learned or {})
    facts["seconds"] += blocks.get("seconds", 0)
    return replace(made, learned=facts | {"block_steps": blocks.get("steps", 0)})


def _row(
    rows: list[dict[str, Any]], where: dict[str, Any], recipe: str, plain: Made, make: Any,
    tools: peer.Tools, base: Path, out: Path | None, spent: dict[str, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The stored row, or what making, writing and measuring gives.

    spent: minutes that recipes with the same blocks, which they share, have taken so far.
    """
    mode = _shared(recipe)
    for row in rows:
        if all(row[key] == value for key, value in {**where, "recipe": recipe}.items()):
            return row
    began = time.monotonic()
    made: Made = make(plain)
    wall = (time.monotonic() - began) / 60
    path = peer.cache_dir() / f"learned-{'-'.join(map(str, where.values()))}-{recipe}.gguf"
    exporters["gguf"].write(made.model, made.weights, path)
    row = {**where, "recipe": recipe, "bytes": path.stat().st_size}
    row |= peer.kld(tools, path, base)
    learned = made.learned or {}
    keys = (
        "block_steps",
        "steps",
        "tokens",
        "best_step",
        "trained",
        "watched_kld_before",
        "watched_kld_after",
    )
    row |= {key: learned[key] for key in keys if key in learned}
    if "errors" in learned:
        row["blocks"] = [{k: float(f"{e[k]:.4g}") for k in FACTS} for e in learned["errors"]]
    if "seconds" in learned:
        row["minutes"] = round(learned["seconds"] / 60, 1)
    if spent is not None:
        spent[mode] = row["wall_minutes"] = round(spent.get(mode, 0.0) + wall, 1)
    rows.append(row)
    _write(out, rows)
    return row


def _shared(recipe: str) -> str:
    """What recipes have in common that share their blocks."""
    mode: str = RECIPES.get(recipe, {}).get("block_mode", recipe)
    return mode


def _write(out: Path | None, rows: list[dict[str, Any]]) -> None:
    if out is not None:
        out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
