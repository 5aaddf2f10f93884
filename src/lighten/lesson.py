"""A lesson: which losses a student learns from, and how much each of them counts.

    lesson = Lesson.parse("logits:1:temperature=4,hidden:0.1")
    parts = lesson.start(student_seen, teacher_seen)     # projections and the like; trained too
    total, values = lesson(student_seen, teacher_seen, labels, parts)

As text, a lesson is losses with commas between them; each is its name, then with colons between
them its weight (1 where none is given) and its options as `name=value`. No shell needs quotes.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn

from lighten.errors import WrongUse
from lighten.registry import losses
from lighten.seen import INSIDE, wide
from lighten.seen import Loss as Loss
from lighten.seen import Seen as Seen

PROBABILITIES = frozenset({"logits", "decoupled", "topk", "labels"})
"""Losses that take outputs for logits of classes."""

_HINT = 'write "logits:1,hidden:0.1", with options "logits:1:temperature=4:direction=reverse"'


@dataclass(frozen=True)
class Term:
    """One loss of a lesson."""

    name: str
    weight: float
    loss: Loss

    def __str__(self) -> str:
        options = [f"{k}={_shown(v)}" for k, v in _changed(self.loss).items()]
        return ":".join([self.name, f"{self.weight:g}", *options])


class Parts(nn.ModuleDict):
    """What losses train beside the student: loss -> module; empty where none trains anything.

    Calling it computes the lesson, so that what wraps a module (DDP) sees its parameters used.
    """

    def __init__(self, lesson: Lesson, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(modules)
        self.lesson = lesson

    def forward(
        self, student: Seen, teacher: Seen | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.lesson(student, teacher, labels, self)


@dataclass(frozen=True)
class Lesson:
    """Losses and their weights: a value; what is trained lives in its Parts.

    >>> lesson = Lesson.parse("labels:0.5,logits:direction=reverse", temperature=4.0)
    >>> str(lesson)
    'labels:0.5,logits:1:temperature=4:direction=reverse'
    >>> sorted(lesson.needs), lesson.taught
    (['labels'], True)
    """

    terms: tuple[Term, ...]

    @classmethod
    def parse(cls, text: str, temperature: float | None = None) -> Lesson:
        """Read a lesson. temperature: of the losses that have one and do not say their own.

        Raises WrongUse, UnknownName.
        """
        terms = [_term(part.strip(), temperature) for part in text.split(",") if part.strip()]
        names = [term.name for term in terms]
        if temperature is not None and not any(hasattr(t.loss, "temperature") for t in terms):
            raise WrongUse(
                f"a temperature of {temperature:g}, and nothing in `{text}` has one",
                "`logits` and `decoupled` have; or leave the temperature out",
            )
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise WrongUse(f"lesson `{text}` names `{twice[0]}` twice", "one weight for each loss")
        if not any(term.weight for term in terms):
            raise WrongUse(f"lesson `{text}` has nothing to learn from", _HINT)
        return cls(tuple(terms))

    def __str__(self) -> str:
        return ",".join(str(term) for term in self.terms)

    @property
    def needs(self) -> frozenset[str]:
        """What has to be there beside outputs: of "labels", "hidden", "attention"."""
        return frozenset().union(*(term.loss.needs for term in self.terms if term.weight))

    @property
    def taught(self) -> bool:
        """Whether any loss looks at a teacher."""
        return any(term.loss.taught for term in self.terms if term.weight)

    @property
    def compares(self) -> bool:
        """Whether any loss compares outputs, all of them, with the teacher's."""
        return any(_compares(term.loss) for term in self.terms if term.weight)

    @property
    def numbers(self) -> bool:
        """Whether outputs are learned from as numbers, and nothing takes them for logits."""
        names = {term.name for term in self.terms if term.weight}
        return "outputs" in names and not names & PROBABILITIES

    @property
    def ends(self) -> bool:
        """Whether the ends of stages are all that its losses look at inside the networks."""
        inside = [term.loss for term in self.terms if term.weight and "hidden" in term.loss.needs]
        return all(getattr(loss, "places", "all") == "ends" for loss in inside)

    def start(self, student: Seen, teacher: Seen | None = None, seed: int = 0) -> Parts:
        """What the losses train beside the student, for networks that show such tensors.

        On the student's device, float32; the same for the same seed. Raises WrongUse where the two
        cannot be compared.
        """
        found: dict[str, nn.Module] = {}
        device = student.outputs.device
        student = student.each(lambda x: wide(x).detach())
        teacher = None if teacher is None else teacher.each(lambda x: wide(x).detach())
        for term in self.terms:
            begin = getattr(term.loss, "start", None)
            if begin is None or not term.weight:
                continue
            with torch.random.fork_rng(devices=[]), _exact(device):
                torch.manual_seed(seed)
                for one in _views(term, student, _there(term.name, teacher), None):
                    if (made := begin(one.student, one.teacher)) is not None:
                        found[one.name] = made.to(device)
        return Parts(self, found)

    def __call__(
        self,
        student: Seen,
        teacher: Seen | None = None,
        labels: Tensor | None = None,
        parts: Mapping[str, nn.Module] | nn.ModuleDict | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(weighted sum, loss -> its own value, detached): scalars, means over the batch.

        Of several outputs, what looks at outputs alone compares each with the teacher's in its
        place, and its value is the mean. labels are of the first; what asks for them of another
        gets the class that the teacher finds likeliest there.

        parts: what `start` gave. Computed in float32 under autocast too; the teacher gets no
        gradient. Raises WrongUse (shapes that do not go together), BadInput (labels out of range).
        """
        values: dict[str, Tensor] = {}
        total: Tensor | None = None
        with _exact(student.outputs.device):
            student = student.each(wide)
            teacher = None if teacher is None else teacher.each(lambda x: wide(x).detach())
            for term in self.terms:
                if not term.weight:
                    continue
                shown = _there(term.name, teacher) if term.loss.taught else student
                found = [
                    term.loss(one.student, one.teacher, one.labels, _own(parts, one.name))
                    for one in _views(term, student, shown, labels)
                ]
                value = found[0] if len(found) == 1 else torch.stack(found).mean()
                values[term.name] = value.detach()
                total = term.weight * value if total is None else total + term.weight * value
        assert total is not None
        return total, values


class _View(NamedTuple):
    """What a loss is shown of one output. name: of what it trains beside the student."""

    name: str
    student: Seen
    teacher: Seen
    labels: Tensor | None


def _views(term: Term, student: Seen, teacher: Seen, labels: Tensor | None) -> list[_View]:
    """One for each output that the loss compares, as far as both networks have them."""
    found = [_View(term.name, student, teacher, labels)]
    if not _compares(term.loss):
        return found
    for i, (s, t) in enumerate(zip(student.others, teacher.others, strict=False), 1):
        target = t.argmax(-1) if "labels" in term.loss.needs else None
        found.append(_View(f"{term.name}_{i}", Seen(s), Seen(t), target))
    return found


def _compares(loss: Loss) -> bool:
    return bool(loss.taught) and not loss.needs & INSIDE


def _own(parts: Mapping[str, nn.Module] | nn.ModuleDict | None, name: str) -> nn.Module | None:
    return parts[name] if parts is not None and name in parts else None


def _exact(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def _there(name: str, teacher: Seen | None) -> Seen:
    if teacher is None:
        raise WrongUse(f"`{name}` needs a teacher, and there is none", "learn from `labels` alone")
    return teacher


def _term(text: str, temperature: float | None) -> Term:
    name, *rest = (part.strip() for part in text.split(":"))
    if "(" in name:
        raise WrongUse(f"`{text}`: options have no brackets", _HINT)
    make = losses[name]
    known = get_type_hints(make)
    options = {f.name: known[f.name] for f in dataclasses.fields(make)}
    given: dict[str, Any] = {}
    weights = [part for part in rest if "=" not in part]
    for part in rest:
        if "=" in part:
            option, value = (side.strip() for side in part.split("=", 1))
            if option not in options:
                near = difflib.get_close_matches(option, options, 1)
                guess = f"did you mean `{near[0]}`? " if near else ""
                has = ", ".join(options) or "none"
                raise WrongUse(f"`{name}` has no option `{option}`", f"{guess}it has: {has}")
            given[option] = _value(name, option, value, options[option])
    if len(weights) > 1:
        raise WrongUse(f"`{text}` has {len(weights)} weights: {', '.join(weights)}", _HINT)
    weight = _number(weights[0]) if weights else 1.0
    if not (math.isfinite(weight) and weight >= 0):
        raise WrongUse(f"`{text}`: a weight must be a finite number, at least 0", _HINT)
    if temperature is not None and "temperature" in options:
        given.setdefault("temperature", float(temperature))
    return Term(name, weight, make(**given))


def _value(name: str, option: str, text: str, kind: type) -> Any:
    if kind is str:
        return text
    number = _number(text)
    if not math.isfinite(number) or (kind is int and number != int(number)):
        whole = "a whole number" if kind is int else "a number"
        raise WrongUse(f"`{name}`: {option} `{text}` is not {whole}", _HINT)
    return kind(number)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _changed(loss: Any) -> dict[str, Any]:
    """The options that are not as they are by default."""
    every = {f.name: (getattr(loss, f.name), f.default) for f in dataclasses.fields(loss)}
    return {name: value for name, (value, default) in every.items() if value != default}


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
