"""A distillation and a recovery that Lightning runs in one or two processes.

python distilling_in_two.py FOLDER DEVICES
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lighten


def network(width: int, seed: int) -> nn.Module:
    """Without norms over the batch, which would see each process's own part of it."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, 3),
    ).eval()  # fmt: skip


def main(folder: Path, devices: int) -> None:
    x = torch.randn(120, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    teacher, student = network(8, 0), network(4, 1)
    asked: dict[str, Any] = {
        "length": "8steps", "batch": 16, "augment": "none", "devices": devices,
        "accelerator": "cpu", "precision": "32-true",
    }  # fmt: skip
    found = lighten.distill(
        teacher, student, (x, teacher(x).argmax(1)), out=folder / "run", samples=40, **asked
    )
    again = lighten.recover(
        student, teacher, x[:2], data=x, folder=folder / "recover", strategy="auto", **asked
    )
    facts = {
        "metrics": found.metrics,
        "sums": [float(p.sum()) for p in found.module.parameters()],
        "recovered": [float(p.sum()) for p in again.network.module.parameters()],
        "after": again.metrics["after"],
    }
    rank = os.environ.get("LOCAL_RANK", "0")
    (folder / f"facts-{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
