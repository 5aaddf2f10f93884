"""What blocks and head of a language model learned, as a run stores it.

One file for each block, and one for the head: part.<part>@<weight> of compressed weights,
vector@<name> of norms and biases, and FACTS. What learned nothing has an empty file, or none of its
parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lighten.model import Model
from lighten.run import Run
from lighten.types import Compressed, Layer

FACTS = ("before", "after", "seconds")
"""Nats per token on held-out windows, and how long it learned."""

HEAD = "head"
"""The name of what the head learned."""


class BlockWeights(Mapping[str, Compressed]):
    """Compressed weights, those of blocks that learned as they are stored in the run."""

    def __init__(self, run: Run, folder: str, old: Mapping[str, Compressed], model: Model) -> None:
        self.run, self.folder, self.old = run, folder, old
        self.places: dict[str, int | str]
        self.places = {la.name: la.block for la in model.layers if la.block is not None}
        self.places |= {la.name: HEAD for la in model.layers if is_head(la)}

    def __iter__(self) -> Iterator[str]:
        return iter(self.old)

    def __len__(self) -> int:
        return len(self.old)

    def __getitem__(self, name: str) -> Compressed:
        weight = self.old[name]
        parts = self._parts(self.places[name], name) if name in self.places else {}
        if not parts:
            return weight
        return Compressed(weight.spec, weight.shape, weight.format, parts)

    def _parts(self, place: int | str, name: str) -> dict[str, Tensor]:
        from safetensors import safe_open

        found = {}
        with safe_open(self.run.path(f"{self.folder}/{place}.safetensors"), "pt") as file:
            for key in file.keys():  # noqa: SIM118  (no mapping)
                kind, _, rest = key.partition("@")
                if kind.startswith("part.") and rest == name:
                    found[kind.removeprefix("part.")] = file.get_tensor(key)
        return found


@dataclass(frozen=True, eq=False)
class LearnedBlocks:
    """weights: of the whole model. vectors: norms and biases by name. errors: rows of FACTS, one
    for each block and one for the head, where it has anything to learn."""

    weights: Mapping[str, Compressed]
    vectors: dict[str, Tensor]
    errors: list[dict[str, Any]]

    @classmethod
    def of(
        cls, run: Run, model: Model, old: Mapping[str, Compressed], folder: str, given: Any
    ) -> LearnedBlocks:
        """As it is stored below `folder` for `given`, on top of what learning began with."""
        vectors, errors = dict[str, Tensor](), list[dict[str, Any]]()
        head = next(la.name for la in model.layers if is_head(la))
        for place, name in (*enumerate(model.blocks), (HEAD, head)):
            found = run.tensors(f"{folder}/{place}", _missing, given=given)
            vectors |= vectors_of(found)
            if found:
                errors.append({"block": name, **{key: float(found[key]) for key in FACTS}})
        return cls(BlockWeights(run, folder, old, model), vectors, errors)


def _missing() -> Mapping[str, Tensor]:
    raise KeyError("this block has not learned yet")


def parts_of(found: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The parts of one weight: part -> tensor."""
    ends = f"@{name}"
    return {
        key.removesuffix(ends).removeprefix("part."): t
        for key, t in found.items()
        if key.startswith("part.") and key.endswith(ends)
    }


def vectors_of(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Norms and biases by name."""
    return {k.removeprefix("vector@"): v for k, v in found.items() if k.startswith("vector@")}


def is_head(layer: Layer) -> bool:
    """Whether a layer is the head, alone or as the embedding too."""
    return "head" in layer.kind.split("+")
