"""Pruning during a training that Lightning runs (package `lightning`).

pruning = GradualPruning(task.network, "0.9", start=100, end=1000, every=50)
trainer = lightning.Trainer(callbacks=[lightning_callback(pruning)])
trainer.fit(task)
pruning.finish()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lighten.errors import MissingPackage, WrongUse
from lighten.schedules import Stepped

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer


def lightning_callback(*parts: Stepped) -> Callback:
    """A Callback that steps GradualPruning, GradualShrinking, GroupLasso, Rewind or WeightMasks
    after every optimizer step, and keeps their state in Lightning's checkpoints.

    Several parts are stepped in the order given. Raises MissingPackage, WrongUse for no part.
    """
    try:
        from lightning.pytorch import Callback
    except ImportError as error:
        raise MissingPackage(
            "a Lightning callback needs the package `lightning`", "pip install lighten[train]"
        ) from error
    if not parts:
        raise WrongUse("a callback without anything to step", "lightning_callback(pruning)")

    class Steps(Callback):  # type: ignore[misc]
        seen = 0

        @property
        def state_key(self) -> str:
            return "_".join(("lighten", *(type(part).__name__ for part in parts)))

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any,
            batch_idx: int,
        ) -> None:  # fmt: skip
            step = trainer.global_step  # the same for all batches that are accumulated
            if step > self.seen:
                self.seen = step
                for part in parts:
                    part.step(step, trainer.optimizers)

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen, "parts": [part.state_dict() for part in parts]}

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            saved = state_dict["parts"]
            if len(saved) != len(parts):
                raise WrongUse(
                    f"the checkpoint has {len(saved)} parts, the callback {len(parts)}",
                    "give the callback what it had",
                )
            self.seen = int(state_dict["seen"])
            for part, own in zip(parts, saved, strict=True):
                part.load_state_dict(own)

    return Steps()
