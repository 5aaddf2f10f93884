"""Blocks: the output of every named block, against what the teacher's block gives.

*Source:* Li et al. 2021, "BRECQ", section 3, without the Fisher weights; relative to the
teacher's square, so that all blocks count alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lighten.errors import WrongUse
from lighten.registry import losses
from lighten.seen import Seen, matched


@losses("blocks")
@dataclass(frozen=True)
class Blocks:
    """Relative squared error of the outputs of blocks, the mean over blocks.

    ‖s − t‖² / ‖t‖² over the batch. Needs outputs of one shape, as a network and its compressed self
    have them.
    """

    source: ClassVar[str] = "Li et al. 2021"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    floor: ClassVar[float | None] = 0.0
    taught: ClassVar[bool] = True

    def __call__(
        self,
        student: Seen,
        teacher: Seen,
        labels: Tensor | None = None,
        parts: nn.Module | None = None,
    ) -> Tensor:
        total = student.outputs.new_zeros(())
        places = matched(student.hidden, teacher.hidden, "outputs of blocks")
        for name, s, t in places:
            if s.shape != t.shape:
                raise WrongUse(
                    f"block `{name}` gives {tuple(s.shape)}, the teacher's {tuple(t.shape)}",
                    "`hidden` compares features of different widths",
                )
            total = total + (s - t).square().sum() / t.square().sum().clamp(min=1e-12)
        return total / len(places)
