"""What the stages of a run on a network share: the request, its integers, how it is measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lighten import network_cost
from lighten.coupling import Couplings
from lighten.network import Network
from lighten.network_quality import all_outputs, measure_network
from lighten.precision import Bits, group_of
from lighten.progress import stage
from lighten.quantize_network import quantize as quantize_network
from lighten.quantized import Quantized
from lighten.run import Run
from lighten.samples import Samples
from lighten.simulate import Simulation

BATCH = 128


@dataclass(frozen=True, eq=False)
class Job:
    """What all stages of a run have in common. bits: lighten.precision.Bits, None: all float.
    reduce_range: weights of 7 bits, where this processor's products of 8 bits saturate."""

    run: Run
    network: Network
    samples: Samples
    exporter: Any
    bits: Bits | None
    reduce_range: bool
    multiple: int
    sparsity: str | None
    evaluate: Callable[[Any], float] | None
    within: str = ""
    """A folder of the run, with its slash, for what depends on the bits."""
    made: dict[str, tuple[Network, Quantized]] = field(default_factory=dict)
    """Plan's JSON -> of which network what was made, in this process."""
    learned: int | None = None
    """Examples that integers learn from, None: they do not."""
    logits: bool | None = None
    """False where what is learned says that outputs are numbers; None: see measure_network."""

    @property
    def seen(self) -> Tensor:
        """What integers are fitted to: nothing that the best state of their learning is chosen by,
        since a quantized network is fitted closely to what it was calibrated on."""
        return self.samples.calibration[: self.learned]

    @property
    def original(self) -> Path:
        """The original, exported as it is."""
        return self.run.path(f"original/{called(self.network)}{self.exporter.suffix}")

    def beside(self, before: Mapping[str, Any]) -> network_cost.Beside | None:
        """What candidates are timed in turns with; before: what was measured of the original."""
        return (self.original, float(before["p50_ms"])) if "p50_ms" in before else None


def reserving(job: Job, couplings: Couplings) -> Job:
    """The same, its exporter counting what a checkpoint says of the units that stayed, at most."""
    if job.exporter.name != "checkpoint":
        return job
    every = {axis.name: range(axis.width) for axis in couplings.free}
    return replace(job, exporter=replace(job.exporter, kept=every))


def called(network: Network) -> str:
    """What a network is called in names of files."""
    last = network.source.rpartition(":")[2].partition("(")[0]
    found = re.sub(r"\W+", "-", Path(last).name.removesuffix(".pt2")).strip("-")
    return found or "network"


def quantized(job: Job, network: Network) -> Quantized:
    """Ranges, transforms and rounding. Deterministic, and so not stored but made again."""
    bits = job.bits or (8, 8)
    with stage("quantize"):
        return quantize_network(
            network,
            job.seen,
            bits_weights=bits[0],
            bits_activations=bits[1],
            group=group_of(bits),
            reduce_range=job.reduce_range,
        )


def roughly(job: Job, network: Network) -> Network | Quantized:
    """What would be exported, but with numbers that only its size and speed do not depend on."""
    if job.bits is None:
        return network
    return quantize_network(
        network, job.samples.calibration[:4], bits_weights=job.bits[0],
        bits_activations=job.bits[1], group=group_of(job.bits), ranges="minmax", solver="rtn",
        reduce_range=job.reduce_range,
    )  # fmt: skip


def quality(
    job: Job, network: Callable[[Tensor], Any], keep: str | None = None, given: Any = None
) -> dict[str, Any]:
    """Against the original, on what was held out. keep: where in the run the outputs stay."""
    stored = job.run.tensors("original/outputs", lambda: _originals(job))
    reference = [stored[name] for name in sorted(stored)]  # `outputs` comes first
    found = measure_network(
        network, job.samples.held_out, job.samples.labels, reference=reference,
        evaluate=job.evaluate, logits=job.logits, size=BATCH,
    )  # fmt: skip
    if keep is not None and (kept := found.outputs) is not None:
        job.run.tensors(keep, lambda: {"outputs": kept}, given=given)
    hidden = ("examples", "reference_accuracy")
    return {k: v for k, v in found.as_dict().items() if k not in hidden}


def _originals(job: Job) -> dict[str, Tensor]:
    """What the original gives: `outputs`, and what is beside them."""
    found = all_outputs(job.network, job.samples.held_out, BATCH)
    return {"outputs" if not i else f"outputs.{i:03}": x for i, x in enumerate(found)}


def runner(made: Network | Quantized) -> Callable[[Tensor], Any]:
    """What a network, or the runtime's arithmetic of a quantized one, gives for a batch."""
    return Simulation(made) if isinstance(made, Quantized) else made
