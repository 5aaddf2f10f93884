"""What a student is of a teacher that is a language model: how many layers, how wide, begun how."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lighten.errors import WrongUse
from lighten.students import StudentSpec

_LAYERS = r"(\d+)\s+(?:layers?|blocks?)"
_FORM = 'write "half depth", "8 layers", "half depth, half width", and "from scratch" beside'


@dataclass(frozen=True)
class LanguageSpec:
    """layers: of `of` transformer blocks. width: share of the units of each feed-forward part, all
    else stays as wide as it is. scratch: weights are drawn anew, not taken over.

    >>> spec = LanguageSpec.parse("half depth, 0.75 width", 30)
    >>> spec.layers, str(spec), str(LanguageSpec.parse("8 layers, from scratch", 30))
    (15, '15 of 30 layers, 0.75 width', '8 of 30 layers, from scratch')
    """

    layers: int
    of: int
    width: float = 1.0
    scratch: bool = False

    @classmethod
    def parse(cls, text: str, of: int) -> LanguageSpec:
        """Read what a user wrote of a teacher with `of` blocks; raises WrongUse."""
        counts = re.findall(_LAYERS, text.lower())
        if len(counts) > 1 or (counts and "depth" in text.lower()):
            raise WrongUse(f"student `{text}` says twice how deep it is", _FORM)
        if not counts:
            return cls.of_shares(StudentSpec.parse(text), of)
        layers = int(counts[0])
        if not 1 <= layers <= of:
            raise WrongUse(
                f"a student of {layers} layers, and its teacher has {of}",
                f"between 1 and {of}, or name another model as the student",
            )
        rest = re.sub(_LAYERS, "1 depth", text.lower())
        shares = StudentSpec.parse(rest)
        return cls(layers, of, shares.width, shares.scratch)

    @classmethod
    def of_shares(cls, shares: StudentSpec, of: int) -> LanguageSpec:
        """The spec of shares of depth and width; at least one block stays."""
        return cls(max(1, int(shares.depth * of + 0.5)), of, shares.width, shares.scratch)

    @staticmethod
    def meant(text: str) -> bool:
        """Whether a text says how large a student is, and names no model."""
        return StudentSpec.meant(text) or bool(re.match(rf"\s*{_LAYERS}\b", text.lower()))

    def __str__(self) -> str:
        width = [] if self.width == 1 else [f"{self.width:g} width"]
        scratch = ["from scratch"] if self.scratch else []
        return ", ".join([f"{self.layers} of {self.of} layers", *width, *scratch])
