"""Every way in which channels depend on each other, as a tiny network: halved by lighten and by
torch-pruning, neither given a hint.

    pip install torch-pruning
    python benchmarks/patterns/run.py [--json benchmarks/patterns/result.json]

Half of the units of every free axis are set to zero first, in all tensors that they lie in. Who
then removes the units of least magnitude removes zeros, and the output must stay what it was. Rows
say how far it moved: relative error of the outputs, on random inputs.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lighten.compare_outputs import difference
from lighten.coupling import Couplings, couple
from lighten.network import Network
from lighten.shrink import masked, shrink

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from patterns import PATTERNS  # noqa: E402

SAME = 1e-4
HALF = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    path = parser.parse_args().json
    rows = []
    for name, pattern in PATTERNS.items():
        if not pattern.free:
            continue
        rows.append({"name": name, **_row(*pattern.make())})
        print(json.dumps(rows[-1]), flush=True)
    right = {side: sum(r[side] == "equal" for r in rows) for side in ("lighten", "torch_pruning")}
    facts = {"patterns": len(rows), **{f"{k}_right": v for k, v in right.items()}, "rows": rows}
    print({k: v for k, v in facts.items() if k != "rows"})
    if path:
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def _row(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    network = Network.of(module, inputs)
    couplings = couple(network)
    keep = {a.name: torch.arange(a.width)[: max(1, a.width // 2)] for a in couplings.free}
    zeroed = masked(network, couplings, keep)
    ours, own = _judge(zeroed, lambda: shrink(network, couplings, keep))
    theirs, left = _judge(zeroed, lambda: _torch_pruning(zeroed, couplings))
    return {
        "lighten": ours, "lighten_parameters": own, "torch_pruning": theirs,
        "torch_pruning_parameters": left,
    }  # fmt: skip


def _judge(zeroed: Network, make: Any) -> tuple[str, float | None]:
    """("equal", "wrong by ..." or how it failed, share of the parameters that is left)."""
    try:
        small = make()
        error = difference(small, zeroed)
    except Exception as failure:  # whatever a library raises is its answer here
        return f"fails: {type(failure).__name__}", None
    share = small.parameters / zeroed.parameters
    if share == 1:
        return "removes nothing", 1.0
    return ("equal" if error < SAME else f"wrong by {error:.2g}"), round(share, 3)


def _torch_pruning(zeroed: Network, couplings: Couplings) -> Network:
    import torch_pruning as tp

    model = copy.deepcopy(zeroed.module).requires_grad_(True)
    outputs = {
        m.parameter.rpartition(".")[0]
        for a in couplings.axes
        if a.locked == "an output of the network"
        for m in a.members
        if m.role == "writes"
    }
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        tp.pruner.BasePruner(
            model,
            zeroed.inputs,
            importance=tp.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=HALF,
            ignored_layers=[m for n, m in model.named_modules() if n in outputs],
        ).step()
    return zeroed.with_module(model)


if __name__ == "__main__":
    main()
