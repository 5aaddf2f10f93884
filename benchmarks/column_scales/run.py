"""Would columns of other scales make a language model's weights easier to store?

    python benchmarks/gguf_quality/rescale.py
    python benchmarks/column_scales/run.py CALIBRATION.txt

AWQ and SmoothQuant multiply the columns of weights by factors, and what feeds them by the inverse:
the same function, other numbers to round. Here the solver's error is compared with and without, for
all linear layers of some blocks of two copies of SmolLM2-135M. `rescaled` is the model of
gguf_quality, whose columns were multiplied by random factors, because the published weights lie on
a Q4_1 grid. `dithered` has the columns as they were trained: each of its weights was moved by a
random part of its step on that grid, which makes it another network, but a usual one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "gguf_quality"))
from dither import FOLDER, dithered  # noqa: E402
from peer import cache_dir  # noqa: E402

from lighten.calibrate import Stream  # noqa: E402
from lighten.data import load_text, windows  # noqa: E402
from lighten.model import Model, open_model  # noqa: E402
from lighten.progress import note  # noqa: E402
from lighten.registry import formats  # noqa: E402
from lighten.solvers.gptq import PASSES  # noqa: E402
from lighten.sweep import Factor, descend, row_errors, sweep  # noqa: E402
from lighten.types import Layer, Stats  # noqa: E402

FACTORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "even columns": lambda size, importance: 1 / size,
    "balanced": lambda size, importance: importance**0.25 / size**0.5,
    "half of that": lambda size, importance: importance**0.125 / size**0.25,
}
"""size: root mean square of a column; importance: of an error in it, as the sweep sees it
(Factor.importance). `balanced` has the least sum of squared steps times importance where the
largest weight of a group is that of its columns' sizes."""

FORMATS = {576: "iq4_nl", 1536: "q4_k"}
"""By the number of columns."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 15, 27])
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    copies = {
        "rescaled": cache_dir() / "smollm2-rescaled",
        "dithered": dithered(cache_dir()) / FOLDER,
    }
    rows = []
    for copy, path in copies.items():
        model = open_model(path)
        ids = windows(load_text(args.calibration), model.tokenizer, 512, args.windows, seed=0)
        for block, layers, stats in groups(Stream(model, ids), set(args.blocks)):
            row = {"copy": copy, "block": block} | compared(model, layers, stats)
            rows.append(row)
            note(json.dumps(row))
    facts = {"windows": args.windows, "rows": rows, "torch": torch.__version__.split("+")[0]}
    (HERE / "result.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def groups(stream: Stream, blocks: set[int]) -> Iterator[tuple[int, list[Layer], Stats]]:
    """(block, layers that see the same input, its statistics) of some blocks."""
    for index in stream:
        block = stream.load(index)
        if index in blocks:
            layers = [la for la in stream.model.layers if la.block == index]
            for key, stats in stream.stats(index, block).items():
                yield index, [la for la in layers if la.shares == key], stats
        stream.advance(index, block)
        if index == max(blocks):
            return


@torch.no_grad()
def compared(model: Model, layers: list[Layer], stats: Stats) -> dict[str, Any]:
    """The solver's error with columns scaled, over that without, by how they are scaled."""
    w = torch.cat([model.weight(layer) for layer in layers])
    format = FORMATS[w.shape[1]]
    plain = error(w, stats.hessian, format)
    size, importance = w.square().mean(0).sqrt(), Factor.of(stats.hessian).importance
    ratios = {}
    for name, factors in FACTORS.items():
        s = factors(size, importance)
        s = s / s.log().mean().exp()
        ratios[name] = round(error(w * s, stats.hessian / s / s[:, None], format) / plain, 4)
    kinds = [layer.name.split(".")[-2].removesuffix("_proj") for layer in layers]
    return {"layers": kinds, "format": format, "ratios": ratios}


def error(w: Tensor, hessian: Tensor, name: str) -> float:
    format, factor = formats[name], Factor.of(hessian)
    codes, grid = sweep(w, factor, format)
    codes, grid = descend(w, factor.hessian, format, codes, grid, PASSES)
    return float(row_errors(w, format.decode(codes, grid), hessian).sum())


if __name__ == "__main__":
    main()
