"""Blocks that keep what their gradients need, where memory is free; the others run again.

Running a block again takes a sixth of a step (benchmarks/recovery_memory), so it is done where
memory asks for it and not everywhere. Gradients are the same either way.

*Source:* Chen et al. 2016, "Training deep nets with sublinear memory cost" (arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lighten.preflight import available_memory

SHARE = 0.5
"""Of the memory that is free, at most."""


class KeptActivations:
    """Decides once, when the first block of the first step has run, how many of `blocks` keep.

    owed: gives the bytes that learning will take besides (gradients, the optimizer's state).
    count: how many keep, the first ones; None before it is decided.
    """

    def __init__(self, blocks: int, owed: Callable[[], int]) -> None:
        self.blocks, self.owed = blocks, owed
        self.count: int | None = None

    def measured(self, run: Callable[[], Any], device: torch.device) -> Any:
        """What `run`, the first block's forward pass, gives; it keeps, and is the measure."""
        free = free_memory(device)
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = run()
        spread = torch.distributed.is_available() and torch.distributed.is_initialized()
        if spread or free is None:  # processes that share a machine do not know of each other
            self.count = 0
        else:
            room = SHARE * (free - self.owed())
            self.count = min(self.blocks, max(0, int(room / max(sum(sizes.values()), 1))))
        return out


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had there; None where that is not known."""
    if device.type == "cpu":
        return available_memory()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return None
