"""Students made from their teacher: fewer layers, narrower, and begun from what the two share.

made = make_student(teacher, StudentSpec.parse("half depth, half width"), images)
made.network            # blocks left out, then units of every axis, then made up for
made.save(folder)       # lighten.load(factory of the teacher, folder) builds it again
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

from lighten import saved
from lighten.batchnorms import better_norms
from lighten.compensate import compensate
from lighten.coupling import Couplings, couple
from lighten.coupling.axes import analyse
from lighten.depth import Blocks, shallower, take_blocks
from lighten.errors import WrongUse
from lighten.network import Network
from lighten.pretrained import is_pretrained
from lighten.progress import stage
from lighten.prune import GROUP_OBS, rank
from lighten.seeds import seed_of
from lighten.shrink import shrink
from lighten.structure import free
from lighten.widths import at_share, keep_of

_WORDS = {"half": 0.5, "third": 1 / 3, "quarter": 0.25, "full": 1.0}
_FORM = 'write "half depth, half width", "0.75 width", "1/3 depth", and "from scratch" beside'


@dataclass(frozen=True)
class StudentSpec:
    """What a student is of its teacher. depth: share of the blocks of each list. width: of the
    units of each axis. scratch: weights are drawn anew, not taken over."""

    depth: float = 1.0
    width: float = 1.0
    scratch: bool = False

    @classmethod
    def parse(cls, text: str) -> StudentSpec:
        """Read what a user wrote; raises WrongUse.

        >>> StudentSpec.parse("half depth, 0.75 width"), str(StudentSpec.parse("1/4 width"))
        (StudentSpec(depth=0.5, width=0.75, scratch=False), '0.25 width')
        """
        said: dict[str, float] = {}
        scratch = False
        for part in re.split(r",|\band\b", text.strip().lower()):
            if re.fullmatch(r"\s*(from\s+)?scratch\s*", part):
                scratch = True
                continue
            found = re.fullmatch(r"\s*(\S+)\s+(depth|width)\s*", part)
            if found is None or found[2] in said:
                raise WrongUse(f"student `{text}` cannot be read", _FORM)
            said[found[2]] = _share(found[1], text)
        if not said:
            raise WrongUse(f"student `{text}` says neither depth nor width", _FORM)
        return cls(said.get("depth", 1.0), said.get("width", 1.0), scratch)

    @staticmethod
    def meant(text: str) -> bool:
        """Whether a text says how large a student is, and is no factory's name."""
        return bool(re.search(r"\b(depth|width|scratch)\s*(,|\band\b|$)", text.lower())) and (
            ":" not in text
        )

    def __str__(self) -> str:
        shares = {"depth": self.depth, "width": self.width}
        parts = [f"{share:g} {what}" for what, share in shares.items() if share != 1] or ["1 width"]
        return ", ".join([*parts, *(["from scratch"] if self.scratch else [])])


@dataclass(frozen=True, eq=False)
class Student:
    """A network that can be built again. blocks, keep: what of the teacher it has; both empty for
    one that was not made from it."""

    network: Network
    blocks: Blocks = field(default_factory=dict)
    keep: Mapping[str, Tensor] = field(default_factory=dict)
    couplings: Couplings | None = None

    def save(self, folder: Path) -> None:
        """safetensors and a JSON of what was kept; `lighten.load(factory, folder)` reads them."""
        saved.save(self.network, folder, self.couplings, self.keep, self.blocks)


def make_student(
    teacher: Network, spec: StudentSpec, data: Tensor, *, multiple: int = 1, seed: int = 0
) -> Student:
    """A smaller copy of the teacher, its weights those that are left.

    data: inputs (count, ...) that units are ranked and made up for on. multiple: channel counts are
    multiples of it. Raises WrongUse where nothing can be left out.
    """
    with stage("leave blocks out"):
        shallow, blocks = shallower(teacher, spec.depth)
    made = Student(shallow, blocks)
    if spec.width < 1:
        made = _narrower(made, spec, data, multiple)
    if spec.scratch:
        return replace(made, network=from_scratch(made.network, seed))
    with stage("batch norms"):
        norms = better_norms(teacher, made.network, data)
    notes = (*norms.network.notes, *([norms.said] if norms.said else []))
    return replace(made, network=replace(norms.network, notes=notes))


def read_student(teacher: Network, folder: Path, notes: Sequence[str] = ()) -> Student:
    """A student that `save` wrote, ready to be changed and saved again; raises BadInput."""
    module = saved.load(lambda: teacher.module, folder)
    blocks, keep = saved.kept(folder)
    couplings = None
    if keep:
        shallow = copy.deepcopy(teacher.module)
        take_blocks(shallow, blocks)
        couplings = analyse(teacher.with_module(shallow))
    network = Network(module.requires_grad_(False), teacher.inputs, teacher.source, tuple(notes))
    return Student(network, blocks, keep, couplings)


def _narrower(made: Student, spec: StudentSpec, data: Tensor, multiple: int) -> Student:
    whole = made.network
    with stage("couple channels"):
        couplings = couple(whole)
    with stage("rank channels"):
        # from scratch, which units stay is all the same: magnitudes are quick
        ranking = rank(whole, couplings, data, "l2" if spec.scratch else GROUP_OBS)
    axes = free(couplings.axes, ranking)
    keep = keep_of(ranking, at_share(axes, ranking, spec.width, multiple))
    if not keep:
        raise WrongUse(
            f"{whole.source} has no width that can be {spec.width:g} of what it is",
            "ask for a share of the depth only, or name a student of your own",
        )
    small = shrink(whole, couplings, keep)
    if not spec.scratch:
        with stage("compensate", len(whole.layers), "weights") as tick:
            small = compensate(whole, small, couplings, keep, data, tick=tick)
    return Student(replace(small, notes=(*whole.notes, *small.notes)), made.blocks, keep, couplings)


def from_scratch(network: Network, seed: int = 0) -> Network:
    """A copy with weights drawn anew, as its layers draw them; the same for the same seed.

    Raises WrongUse for parameters that nothing says how to draw.
    """
    fresh = Network.of(network.module, network.inputs, network.source)
    module = fresh.module
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed_of(seed, "student"))
        if is_pretrained(module):
            kind, config = type(module), module.config
            return replace(fresh.with_module(kind(config).to(fresh.device)), notes=network.notes)
        whole: list[Callable[[], object]] = []
        for path, part in module.named_modules():
            draw = getattr(part, "reset_parameters", None)
            if draw is not None:
                draw()
            elif hasattr(part, "_reset_parameters"):  # nn.MultiheadAttention, nn.Transformer
                whole.append(part._reset_parameters)
            elif own := [name for name, _ in part.named_parameters(recurse=False)]:
                name = f"{path}.{own[0]}" if path else own[0]
                raise WrongUse(
                    f"nothing says how `{name}` begins: {_kind(part)} has no reset_parameters",
                    "without `from scratch` it begins from its teacher; or name a student",
                )
        for draw in reversed(whole):  # these draw for their parts too, so after them
            draw()
    return replace(fresh, notes=network.notes)


def _kind(part: nn.Module) -> str:
    return type(part).__name__


def _share(word: str, text: str) -> float:
    try:
        percent = word.endswith("%")
        value = _WORDS.get(word) or float(Fraction(word.rstrip("%"))) / (100 if percent else 1)
    except (ValueError, ZeroDivisionError) as error:
        raise WrongUse(f"student `{text}`: `{word}` is no share", _FORM) from error
    if not 0 < value <= 1:
        raise WrongUse(f"student `{text}`: `{word}` is not between 0 and 1", _FORM)
    return value
