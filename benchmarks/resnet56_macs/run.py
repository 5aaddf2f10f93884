"""ResNet-56 on CIFAR-10 with fewer multiply-adds and no training: lighten and torch-pruning.

    pip install torch-pruning matplotlib
    python benchmarks/resnet56_macs/run.py WEIGHTS TRAIN TEST [--images 2048] [--factors 1.3 2.11 3]

Accuracy on all test images after dividing the multiply-adds by each factor. lighten: channels by
group OBS, widths by measured curves, least squares on unlabelled training images. torch-pruning: L1
groups, one ratio for all blocks; beside it the same network with its batch norms estimated again
on the same images. No gradient is taken on either side. Writes result.json and curve.svg here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import peer
import torch
from torch import Tensor, nn

from lighten import network_cost, structure, widths
from lighten.compensate import compensate
from lighten.coupling import couple
from lighten.curves import curves
from lighten.images import load_images
from lighten.macs import macs
from lighten.network import Network

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "examples" / "models"))
from cifar_resnet import resnet56  # noqa: E402

FACTORS = (1.3, 1.5, 2.0, 2.11, 2.5, 3.0)
TARGET = 2.11
ROWS = 65_536
"""Positions that each layer is fitted on."""
WAYS = {"lighten": widths.spend, "lighten_streams": widths.spend, "lighten_uniform": widths.uniform}
"""Widths inside branches; of the residual streams too; one share for all branches. The last two at
the target alone."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--images", type=int, default=2048, help="to calibrate on")
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS)
    args = parser.parse_args()
    model = _model(args.weights)
    norm = {"mean": "imagenet", "std": "imagenet"}
    images = load_images(args.train, **norm).tensor(slice(0, args.images))
    held = load_images(args.test, seed=None, **norm)
    test, labels = held.tensor(), held.labels()
    rows = _measured(model, images, test, labels, args.factors)
    facts = {
        "network": "ResNet-56", "test_images": len(test), "calibration_images": len(images),
        "threads": torch.get_num_threads(), "torch": torch.__version__.split("+")[0], **rows,
    }  # fmt: skip
    (HERE / "result.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    draw(facts, HERE / "curve.svg")


def _measured(
    model: nn.Module, images: Tensor, test: Tensor, labels: Tensor, factors: Any
) -> dict[str, Any]:
    began = time.monotonic()
    network = Network.of(model, torch.zeros(2, 3, 32, 32), "resnet56")
    couplings = couple(network)
    analysis = time.monotonic() - began
    found = curves(network, couplings, images)
    ranking = time.monotonic() - began - analysis
    axes = structure.free(couplings.axes, found)
    streams = {a.name for a in axes} - {a.name for a in widths.branches(axes)}
    cost = network_cost.counted(network, axes, "macs")
    whole = macs(network).total
    base = accuracy(model, test, labels)
    rows = []
    for factor in factors:
        began = time.monotonic()
        room = whole / factor
        row: dict[str, Any] = {"factor": factor}
        for name, way in WAYS.items():
            if name != "lighten" and factor != TARGET:
                continue
            held = {} if name == "lighten_streams" else streams
            small = structure.narrow(
                network, couplings, found, cost, room,
                lambda limit, way=way, held=held: way(
                    axes, found, cost.terms, limit, cost.fixed, held=held
                ),
            )  # fmt: skip
            better = compensate(network, small.network, couplings, small.keep, images, rows=ROWS)
            row[f"{name}_macs"] = round(small.cost)
            row[name] = accuracy(better.module, test, labels)
            if name == "lighten":
                row["lighten_seconds"] = time.monotonic() - began
        pruned = peer.prune(model, room)
        row["torch_pruning_macs"] = round(peer.count(pruned))
        row["torch_pruning"] = accuracy(pruned, test, labels)
        row["torch_pruning_bn"] = accuracy(peer.reestimate(pruned, images), test, labels)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {
        "accuracy": base, "macs": round(whole), "analysis_seconds": analysis,
        "curves_seconds": ranking, "rows": rows,
    }  # fmt: skip


def _model(weights: Path) -> nn.Module:
    from lighten.network_weights import load_weights, read_weights

    model = resnet56()
    load_weights(model, read_weights(weights), str(weights))
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, test: Tensor, labels: Tensor, batch: int = 250) -> float:
    """Share of the test images whose likeliest class is the label."""
    right = 0
    for start in range(0, len(test), batch):
        found = model(test[start : start + batch]).argmax(1)
        right += int((found == labels[start : start + batch]).sum())
    return right / len(test)


def draw(facts: dict[str, Any], path: Path) -> None:
    """Accuracy by factor, one line a method."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lighten"
    from matplotlib import pyplot

    names = {
        "lighten": ("lighten", "#1864ab", "o-"),
        "lighten_uniform": ("lighten, one share for all blocks", "#74a9d8", "o"),
        "torch_pruning_bn": ("torch-pruning, batch norms again", "#e8590c", "s--"),
        "torch_pruning": ("torch-pruning L1", "#a61e4d", "s-"),
    }
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for key, (label, colour, style) in names.items():
        spent = f"{key.removesuffix('_bn')}_macs"
        points = [(1.0, 100 * facts["accuracy"])]
        # where each network really is: widths are whole numbers
        points += [(facts["macs"] / r[spent], 100 * r[key]) for r in facts["rows"] if key in r]
        axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=5)
    axes.set_xlabel("multiply-adds divided by")
    axes.set_ylabel("accuracy on the test images, %")
    axes.set_title("ResNet-56, CIFAR-10, no training", loc="left")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
