"""How long to learn: a number of epochs or of steps."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lighten.errors import WrongUse

_HINT = 'write "10epochs" or "500steps"'


@dataclass(frozen=True)
class Length:
    """Epochs are passes over the data, steps are updates of the weights.

    >>> Length.parse("10epochs").steps(per_epoch=390), str(Length.parse("500 steps"))
    (3900, '500steps')
    """

    count: float
    unit: str

    @classmethod
    def parse(cls, text: str | Length) -> Length:
        """Read "10epochs", "0.5 epochs", "500steps"; raises WrongUse."""
        if isinstance(text, Length):
            return text
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(epoch|step)s?", text.strip().lower())
        if found is None:
            raise WrongUse(f"length `{text}` cannot be read", _HINT)
        count, unit = float(found[1]), f"{found[2]}s"
        if count <= 0 or (unit == "steps" and count != int(count)):
            raise WrongUse(f"length `{text}` is no time to learn in", _HINT)
        return cls(count, unit)

    def steps(self, per_epoch: int | None) -> int:
        """How many steps that is; raises WrongUse where an epoch's are needed and not known."""
        if self.unit == "steps":
            return int(self.count)
        if per_epoch is None:
            raise WrongUse(
                f"length `{self}` needs data that says how long it is",
                'give the length in steps, "500steps", or data with a length',
            )
        return max(1, math.ceil(self.count * per_epoch))

    def share(self, share: float) -> Length:
        """A share of the length, at least a step."""
        if self.unit == "steps":
            return Length(max(1, round(share * self.count)), "steps")
        return Length(share * self.count, self.unit)

    def __str__(self) -> str:
        return f"{self.count:g}{self.unit}"
