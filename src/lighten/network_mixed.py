"""The stage of a run that chooses the format of every layer together with the widths of the axes.

One call of `decide` spends the budget on both. Beside it stand the plain ways: one precision for
the whole network, and widths for the rest of the budget. Each is made and measured on held-out
data, and the best one is taken.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lighten import network_cost, network_results
from lighten.coupling import Couplings, couple
from lighten.decide import decide
from lighten.errors import ImpossibleBudget
from lighten.format_errors import FormatErrors, format_errors
from lighten.job import Job, quality, reserving, runner
from lighten.mixed_cost import KEEP, Predicted, byte_terms, decisions_of, format_of, time_terms
from lighten.mixture import Touch, layers, quantize_mixed
from lighten.network import Network
from lighten.network_structure import at_widths, axis_curves, structure
from lighten.precision import Bits
from lighten.progress import note, stage
from lighten.quantized import Quantized
from lighten.registry import formats, transforms
from lighten.rewrite import editable
from lighten.shrink import shrink
from lighten.structure import Narrowed, free, meet
from lighten.types import Axis, Budget, Plan, Spec
from lighten.widths import Curve, branches, keep_of, options

TOLERANCE = {"ms": 0.04}
"""Share of the budget that may be left over without another try, 0.02 where not told."""


@dataclass(frozen=True, eq=False)
class Way:
    """A network at some widths, the format of each layer, and how that measured."""

    network: Network
    widths: dict[str, int]
    specs: dict[str, str]
    quality: dict[str, Any]

    @property
    def plan(self) -> Plan:
        return Plan(self.specs, self.widths)


def mixed(
    job: Job, limit: Budget, before: Mapping[str, Any]
) -> tuple[Network, Plan, list[dict[str, Any]]]:
    """The network at the widths of the best way, its plan, which names every layer's format, and
    what was measured of each way. Raises ImpossibleBudget where no way meets the budget."""
    room = limit.amount(network_cost.now(limit, before))
    names = layers(editable(transforms["fold_batchnorm"](job.network)))
    if room >= network_cost.now(limit, before):
        note("the original meets the budget: all layers in 8 bits")
        whole = dict.fromkeys(names, _option(job, 8))
        return job.network, Plan(whole), []
    made: dict[str, Way] = {}
    cannot: ImpossibleBudget | None = None
    for word, bits in _singles(job, limit).items():
        option = _option(job, bits[0])
        sub = replace(job, bits=bits, within=f"{word}/")
        try:
            small, plan, _ = structure(sub, limit, before)
        except ImpossibleBudget as error:
            cannot = error
            continue
        specs = dict.fromkeys(names, option)
        made[word] = _measured(job, small, dict(plan.widths), specs, word)
    choices = [
        KEEP,
        *dict.fromkeys(_option(job, bits[0]) for bits in _singles(job, limit).values()),
    ]
    try:
        _joint(job, limit, before, names, choices, made)
    except ImpossibleBudget as error:
        if not made:
            raise cannot or error from error
    best = max(made, key=lambda name: network_results.score(made[name].quality))
    rows = [
        {"plan": name, "chosen": "yes" if name == best else "", **way.quality}
        for name, way in made.items()
    ]
    return made[best].network, made[best].plan, rows


def made_of(job: Job, network: Network, plan: Plan) -> Network | Quantized:
    """The network with its layers in the plan's formats; deterministic, and so not stored, but
    what this process has made already is not made again."""
    known = job.made.get(plan.to_json())
    if known is not None and known[0] is network:
        return known[1]
    specs = {name: Spec.parse(text) for name, text in plan.specs.items()}
    if not any(spec.format for spec in specs.values()):
        return network
    with stage("quantize"):
        found = quantize_mixed(network, job.seen, specs)
    job.made[plan.to_json()] = network, found
    return found


def _singles(job: Job, limit: Budget) -> dict[str, Bits]:
    """The precisions of a whole network that the budget could be met with. Of time, 4 bits save
    nothing: they are multiplied as 8."""
    activations = _activations(job)
    words = {8: "int8", 4: "w4a8"} if activations else {8: "w8", 4: "w4"}
    return {words[b]: (b, activations) for b in ((8,) if limit.unit == "ms" else (8, 4))}


def _activations(job: Job) -> int | None:
    """Bits of tensors: a checkpoint holds weights, and nothing runs it as integers."""
    return 8 if job.exporter.name == "onnx" else None


def _option(job: Job, bits: int) -> str:
    """The text of a spec for weights of so many bits, as the exporter and processor want them."""
    activations = _activations(job)
    stored = 7 if bits == 8 and activations and job.reduce_range else bits
    asked = None if activations is None else str(activations)
    return str(Spec(f"int{stored}_channel_sym", activations=asked, solver="gptq"))


# -- widths and formats together -----------------------------------------------------------------
def _joint(
    job: Job, limit: Budget, before: Mapping[str, Any], names: list[str], choices: list[str],
    made: dict[str, Way],
) -> None:  # fmt: skip
    """Add what `decide` finds over widths and formats: with all axes free, and with the streams
    that branches add to at their width."""
    with stage("couple channels"):
        couplings = couple(job.network)
    job = reserving(job, couplings)
    found = axis_curves(job, couplings)
    axes = free(couplings.axes, found)
    streams = {a.name for a in axes} - {a.name for a in branches(axes)}
    errors = _errors(job, [str(Spec.parse(t).format) for t in choices if t != KEEP], len(names))
    room = limit.amount(network_cost.now(limit, before))
    spent = _Spend(job, limit, axes, names, choices, job.beside(before))
    ways: dict[str, Collection[str]] = {"mixed": ()}
    if streams:
        ways = {"mixed branches": streams, **ways}
    for name, held in ways.items():
        try:
            values = _values(job, couplings, found, axes, errors, spent, room, name, held)
        except ImpossibleBudget:
            if name == "mixed":
                raise
            continue
        widths = {a.name: int(values[a.name]) for a in axes if values[a.name] < a.width}
        specs = {layer: str(values[format_of(layer)]) for layer in names}
        if any(way.specs == specs and _same(way.widths, widths, axes) for way in made.values()):
            continue
        small = job.network
        if widths:
            small = at_widths(job, couplings, found, widths, name).network
        made[name] = _measured(job, small, widths, specs, name)


def _same(a: Mapping[str, int], b: Mapping[str, int], axes: list[Axis]) -> bool:
    return all(a.get(x.name, x.width) == b.get(x.name, x.width) for x in axes)


def _values(
    job: Job, couplings: Couplings, found: Mapping[str, Curve], axes: list[Axis],
    errors: FormatErrors, spent: _Spend, room: float, name: str, held: Collection[str],
) -> dict[str, Any]:  # fmt: skip
    """Axis -> width and layer's decision -> option, the real cost within the budget; stored."""
    formats_of, losses = decisions_of(errors, spent.choices)
    widths_of = [options(a, found[a.name], job.multiple, a.name in held) for a in axes]
    decisions = [*widths_of, *formats_of]

    def make(values: dict[str, Any]) -> Narrowed:
        keep = keep_of(found, {a.name: values[a.name] for a in axes})
        small = shrink(job.network, couplings, keep) if keep else job.network
        return Narrowed(small, values, keep, spent.actual(small, values))

    def work() -> dict[str, Any]:
        with stage(f"choose widths and formats ({name})"):
            predicted = spent.predicted
            full, cost = spent.whole
            met = meet(
                Narrowed(job.network, full, {}, cost), make, predicted, room,
                lambda cost: decide(decisions, predicted.terms, cost, predicted.fixed, losses),
                spent.tolerance,
            )  # fmt: skip
            return dict(met.widths)

    stored: dict[str, Any] = job.run.json(f"mixed/{name.replace(' ', '-')}", work)
    return stored


class _Spend:
    """Predicted and real cost of widths and formats, in the budget's unit."""

    def __init__(
        self, job: Job, limit: Budget, axes: list[Axis], names: list[str], choices: list[str],
        beside: network_cost.Beside | None,
    ) -> None:  # fmt: skip
        self.beside = beside
        self.job, self.limit, self.axes = job, limit, axes
        self.names, self.choices = names, choices
        self.tolerance = TOLERANCE.get(limit.unit, 0.02)
        self._predicted: Predicted | None = None
        self._taken: dict[tuple[tuple[str, Any], ...], float] = {}

    @property
    def predicted(self) -> Predicted:
        """Made when it is first asked for: that takes time, and a resumed run does not ask."""
        if self._predicted is None:
            self._predicted = self._time() if self.limit.unit == "ms" else self._bytes()
        return self._predicted

    def actual(self, network: Network, values: Mapping[str, Any]) -> float:
        """Of what would be exported, its numbers quickly chosen; once for the same values."""
        key = tuple(sorted(values.items()))
        if key not in self._taken:
            self._taken[key] = self._take(network, values)
        return self._taken[key]

    def _take(self, network: Network, values: Mapping[str, Any]) -> float:
        specs = {n: Spec.parse(values[format_of(n)]) for n in self.names}
        made: Network | Quantized = network
        if any(spec.format for spec in specs.values()):
            made = quantize_mixed(network, self.job.samples.calibration[:4], specs, quick=True)
        with tempfile.TemporaryDirectory(prefix="lighten-") as folder:
            path = Path(folder) / "candidate.onnx"
            self.job.exporter.write(made, path)
            return network_cost.taken(self.limit, path, self.beside)

    def _time(self) -> Predicted:
        path = self.job.run.folder / "latencies.json"
        with stage("time operators"):
            found = time_terms(
                self.job.network, self.axes, self.names,
                lambda integer: network_cost.times(path, integer),
            )  # fmt: skip
        keep, integer = self.choices[:2]
        with stage("time whole networks"):
            real = [self._real(kinds) for kinds in ([integer], [keep], [integer, keep])]
        return found.predicted(found.fitted(*real))

    @property
    def whole(self) -> tuple[dict[str, Any], float]:
        """All widths as they are and all layers in 8 bits, and what that costs."""
        return self._real([self.choices[1]])

    def _real(self, kinds: Sequence[str]) -> tuple[dict[str, Any], float]:
        """The whole network, its layers of these formats in turns, and what it really costs."""
        values: dict[str, Any] = {a.name: a.width for a in self.axes}
        values |= {format_of(n): kinds[i % len(kinds)] for i, n in enumerate(self.names)}
        return values, self.actual(self.job.network, values)

    def _bytes(self) -> Predicted:
        """What an integer layer adds to the file is read off two whole files."""
        shapes = {layer.name: layer.shape for layer in self.job.network.layers}
        bits = {
            name: {text: _bits(text, shapes[name][1]) for text in self.choices}
            for name in self.names
        }
        plain = byte_terms(self.job.network, self.axes, bits)
        real = [self._real([option]) for option in self.choices[:2]]
        costs = [cost - plain(values) for values, cost in real]
        overhead = (costs[1] - costs[0]) / max(1, len(self.names))
        return byte_terms(self.job.network, self.axes, bits, overhead)


def _bits(option: str, columns: int) -> float:
    """Bits that a stored weight takes, scales left out."""
    name = Spec.parse(option).format
    if name is None:
        return 32.0
    code = int(getattr(formats[name], "code_bits", 8))
    return 8.0 if code > 4 else 4.0


# -- measured ------------------------------------------------------------------------------------
def _errors(job: Job, names: list[str], count: int) -> FormatErrors:
    """What every layer loses in every format; stored."""

    def work() -> dict[str, Any]:
        with stage("sensitivity of formats", count, "layers") as tick:
            found = format_errors(
                job.network, job.samples.calibration, names, activations=_activations(job),
                tick=tick,
            )  # fmt: skip
        return {
            "weights": {layer: dict(each) for layer, each in found.weights.items()},
            "edges": [
                {"layers": sorted(touch.names), "nearest": touch.nearest, "nats": nats}
                for touch, nats in found.edges
            ],
        }

    stored = job.run.json("format_errors", work)
    return FormatErrors(
        stored["weights"],
        [(Touch(frozenset(e["layers"]), e["nearest"]), e["nats"]) for e in stored["edges"]],
    )


def _measured(
    job: Job, small: Network, widths: dict[str, int], specs: dict[str, str], name: str
) -> Way:
    plan = Plan(specs, widths)

    def work() -> dict[str, Any]:
        made = made_of(job, small, plan)
        with stage(f"measure ({name})"):
            return {**network_cost.sizes(small), **quality(job, runner(made))}

    key = f"measured/{name.replace(' ', '-')}"
    return Way(small, widths, specs, job.run.json(key, work, given=plan.to_json()))
