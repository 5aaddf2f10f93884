"""TensorBoard event files of a training, where the package `tensorboard` is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class EventLog:
    """Numbers by step; nothing is written without a folder or without tensorboard."""

    def __init__(self, folder: Path | None, step: int) -> None:
        """step: where the training goes on; what an earlier one logged after it is dropped."""
        self._writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return  # the same rows are in history.jsonl
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, row: Mapping[str, Any]) -> None:
        """The numbers of a row, at its step."""
        if self._writer is None:
            return
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
