"""Nine weights of ten go while Lightning trains a network: one callback.

pip install lighten[train]
python examples/prune_with_lightning.py

The callback keeps its masks in Lightning's checkpoints: `trainer.fit(task, ckpt_path=...)` goes on.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from blurred_shapes import accuracy, network, shapes
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from lighten.gradual import GradualPruning
from lighten.lightning_callback import lightning_callback


class Task(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch, index):  # type: ignore[no-untyped-def]
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train and prune with Lightning.")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args(arguments)
    seed_everything(0, verbose=False)
    data = DataLoader(TensorDataset(*shapes(4000)), batch_size=64, shuffle=True)
    task, steps = Task(), args.steps
    pruning = GradualPruning(task.network, "0.9", start=steps // 4, end=steps * 3 // 4, every=5)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", callbacks=[lightning_callback(pruning)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, data)
    pruned = pruning.finish()
    print(f"zeros      {pruning.share:.1%}")
    print(f"accuracy   {accuracy(pruned):.1%}")
    print(f"bytes      {sum(w.nbytes() for w in pruning.compressed('f16').values()):,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
