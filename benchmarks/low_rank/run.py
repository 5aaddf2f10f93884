"""ResNet-20 with its convolutions factorized, beside the same with channels removed; no training.

    python benchmarks/low_rank/run.py TRAIN TEST WEIGHTS [--json result.json]

TRAIN, TEST: CIFAR-10 as parquet; WEIGHTS: of the ResNet-20, see benchmarks/resnet56_macs. A
convolution (out, in, k, k) becomes one with r outputs and one of 1x1 from r to out. With C the
covariance of its inputs and D the scale of the norm behind it, tr(D (W - V) C (W - V)' D) is least
among V of rank r for V = D^-1 U U' D W; the columns of U are the first r eigenvectors of
D W C W' D. The mean goes into a bias. Ranks are chosen by what each alone costs in nats on other
images, by the knapsack that formats are chosen by. Both ways get the same calibration images.

*Source:* Zhang et al. 2015, "Accelerating Very Deep Convolutional Networks for Classification and
Detection", section 3.1.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lighten import network_cost
from lighten.images import load_images
from lighten.knapsack import Options, knapsack
from lighten.macs import macs
from lighten.moments import hessians
from lighten.network import Network
from lighten.network_quality import measure_network, outputs
from lighten.prune import prune_network
from lighten.registry import exporters
from lighten.types import Stats

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from cifar import NORM, trained  # noqa: E402

CALIBRATION, VALIDATION, TEST = 256, 128, 2000
BUDGETS = (0.9, 0.8, 0.7)
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Of the rank from which on nothing is saved."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("train", "test", "weights"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--json", type=Path, default=HERE / "result.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        facts = _measured(args, Path(folder))
    args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _measured(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    train, test = (load_images(p, size=32, **NORM) for p in (args.train, args.test))
    network = trained("resnet20", args.weights)
    data = train.tensor(slice(0, CALIBRATION))
    others = train.tensor(slice(CALIBRATION, CALIBRATION + VALIDATION))
    x, y = test.tensor(slice(0, TEST)), test.labels(slice(0, TEST))
    reference = outputs(network, x)
    total, files, rows = macs(network).total, {}, []

    def row(way: str, budget: float, made: Network) -> None:
        found = measure_network(made, x, y, reference=reference).as_dict()
        kept = {k: found[k] for k in ("accuracy", "top1_agreement", "mean_kld")}
        name = f"{way} {budget:g}"
        files[name] = folder / f"{len(files)}.onnx"
        exporters["onnx"].write(made, files[name])
        spent = macs(made).total / total
        rows.append({"way": way, "budget": budget, "macs": spent,
                     "parameters": made.parameters, **kept})  # fmt: skip
        print(name, f"{spent:.3f}", {k: round(v["value"], 4) for k, v in kept.items()}, flush=True)

    row("original", 1.0, network)
    low = LowRank(network, hessians(network, data), others)
    for budget in BUDGETS:
        row("low rank", budget, low.within(budget * total))
        row("channels", budget, prune_network(network, data, budget=f"{budget:g} macs").network)
    times = network_cost.speeds("onnx", files)
    for name, found in zip(files, rows, strict=True):
        found["p50_ms"] = times[name]["p50_ms"]
    return {"network": "resnet20", "calibration": CALIBRATION, "test": TEST, "threads": 1,
            "torch": torch.__version__, "rows": rows}  # fmt: skip


class LowRank:
    """Convolutions that could be factorized, and what each loses alone at each rank."""

    def __init__(self, network: Network, stats: Mapping[str, Stats], images: Tensor) -> None:
        self.network, self.stats = network, stats
        self.modules = dict(network.module.named_modules())
        counted = macs(network)
        self.total = counted.total
        self.options: dict[str, list[tuple[int | None, float, float]]] = {}
        truth = network(images).log_softmax(1)
        for name, module in self.modules.items():
            if not isinstance(module, nn.Conv2d):
                continue
            out, size = module.weight.flatten(1).shape
            at = counted.positions[f"{name}.weight"]
            found: list[tuple[int | None, float, float]] = [(None, at * out * size, 0.0)]
            for share in SHARES:
                rank = max(1, int(share * min(out * size / (out + size), out)))
                made = self.made({name: rank})(images).log_softmax(1)
                nats = float((truth.exp() * (truth - made)).sum(1).mean())
                found.append((rank, at * rank * (out + size), nats))
            self.options[name] = found
            print(name, [(r, round(n, 4)) for r, _, n in found[1:]], flush=True)

    def within(self, limit: float) -> Network:
        """Of the least sum of nats, at most so many multiply-adds."""
        units = list(self.options.values())
        fixed = self.total - sum(found[0][1] for found in units)
        chosen = knapsack(
            [Options(np.array([n for *_, n in u]), np.array([c for _, c, _ in u])) for u in units],
            limit - fixed,
        )
        ranks = {n: u[i][0] for (n, u), i in zip(self.options.items(), chosen, strict=True)}
        return self.made({name: rank for name, rank in ranks.items() if rank is not None})

    def made(self, ranks: Mapping[str, int]) -> Network:
        module = copy.deepcopy(self.network.module)
        for name, rank in ranks.items():
            path, _, leaf = name.rpartition(".")
            norm = self.modules[name.replace("conv", "bn")]
            pair = factorized(self.modules[name], self.stats[f"{name}.weight"], norm, rank)
            setattr(module.get_submodule(path), leaf, pair)
        return self.network.with_module(module)


def factorized(conv: Any, stats: Stats, norm: Any, rank: int) -> nn.Sequential:
    """Two convolutions for one."""
    w = conv.weight.double().flatten(1)
    mean = stats.mean.double() if stats.mean is not None else torch.zeros(w.shape[1]).double()
    covariance = stats.hessian.double() - mean[:, None] * mean
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).double().abs().clamp(min=1e-9)
    scaled = scale[:, None] * w
    u = torch.linalg.eigh(scaled @ covariance @ scaled.T)[1][:, -rank:]
    first = nn.Conv2d(
        conv.in_channels, rank, conv.kernel_size, conv.stride, conv.padding, bias=False
    )
    second = nn.Conv2d(rank, conv.out_channels, 1)
    a, b = u.T @ scaled, u / scale[:, None]
    first.weight.copy_(a.view_as(first.weight))
    second.weight.copy_(b[..., None, None])
    assert second.bias is not None
    second.bias.copy_(w @ mean - b @ (a @ mean) + (0 if conv.bias is None else conv.bias))
    return nn.Sequential(first, second).requires_grad_(False)


if __name__ == "__main__":
    main()
