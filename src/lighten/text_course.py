"""Windows of text as something to learn from: token ids, and the token that follows each."""

from __future__ import annotations

import torch
from torch import Tensor

from lighten.errors import BadInput
from lighten.seen import IGNORED


class TextCourse:
    """Packed windows (count, length) of token ids; nothing about them is random.

    Labels are the next tokens; the last position of a window has none (-100). Raises BadInput.

    >>> TextCourse(torch.tensor([[5, 6, 7]])).batch(torch.tensor([0]), torch.Generator())
    (tensor([[5, 6, 7]]), tensor([[   6,    7, -100]]))
    """

    def __init__(self, windows: Tensor) -> None:
        if windows.dim() != 2 or not windows.numel():
            raise BadInput(
                f"windows of text are {tuple(windows.shape)}, not (count, length)",
                "give more text: at least one window",
            )
        self.windows = windows

    @property
    def count(self) -> int:
        return len(self.windows)

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        ids = self.windows[indices]
        return ids, torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
