"""Pruning during a training that the Trainer of transformers runs (it needs `accelerate`).

pruning = GradualPruning(model, "2:4", start=100, end=1000, every=50, names=[...])
trainer = Trainer(model, arguments, train_dataset=data, callbacks=[trainer_callback(pruning)])
trainer.train()
pruning.finish()
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lighten.errors import BadInput, WrongUse
from lighten.schedules import Stepped

if TYPE_CHECKING:
    from transformers import TrainerCallback

STATE = "lighten_{}.pt"
"""File in each of the trainer's checkpoints, by what is kept in it."""

OWNERS = "lighten_owners"
"""Attribute of the trainer's state: which callback writes which file."""


def trainer_callback(*parts: Stepped) -> TrainerCallback:
    """A TrainerCallback that steps GradualPruning, GradualShrinking, GroupLasso, Rewind or
    WeightMasks after every optimizer step, and keeps their state in the trainer's checkpoints.

    Several parts are stepped in the order given. A resumed training raises BadInput where its
    checkpoint in `output_dir` has no state of them. Raises WrongUse for no part, and in training
    for parts of kinds that another callback of the trainer has, too.
    """
    from transformers import TrainerCallback

    if not parts:
        raise WrongUse("a callback without anything to step", "trainer_callback(pruning)")

    file = STATE.format("_".join(type(part).__name__ for part in parts))

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            owners = vars(state).setdefault(OWNERS, {})
            if owners.setdefault(file, self) is not self:
                raise WrongUse(
                    f"two callbacks would write {file}",
                    "give all parts to one: trainer_callback(a, b)",
                )
            if state.global_step == 0:
                return
            path = _checkpoint(args, state) / file
            if not path.is_file():
                raise BadInput(
                    f"training goes on at step {state.global_step}, but there is no {path}",
                    "resume from a checkpoint in output_dir that was written with this callback",
                )
            saved = torch.load(path, weights_only=True, map_location="cpu")
            if len(saved) != len(parts):
                raise WrongUse(
                    f"the checkpoint has {len(saved)} parts, the callback {len(parts)}",
                    "give the callback what it had",
                )
            for part, own in zip(parts, saved, strict=True):
                part.load_state_dict(own)

        def on_optimizer_step(
            self, args: Any, state: Any, control: Any, optimizer: Any = None, **rest: Any
        ) -> None:
            # the trainer counts this step, and forgets its gradients, only after this call
            for part in parts:
                part.step(state.global_step + 1, getattr(optimizer, "optimizer", optimizer))

        def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.is_world_process_zero:
                path = _checkpoint(args, state) / file
                torch.save([part.state_dict() for part in parts], path)

    return Steps()


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
