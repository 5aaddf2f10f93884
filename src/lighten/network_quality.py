"""How good a network is, and how far from another: accuracy, agreement, divergence, noise.

Whatever is called on a batch and returns a tensor or an array can be measured: a network, the
simulation of a quantized one, a session of onnxruntime. Examples are drawn again for the intervals,
the same ones for both networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lighten.errors import BadInput, BadOutput, WrongUse
from lighten.heads import beside, classes_last, first_of
from lighten.intervals import Array, Estimate, Statistic, bootstrap
from lighten.loaders import check_classes, known
from lighten.network import batches
from lighten.seen import IGNORED

_ROWS = 1024  # examples whose probabilities stand at once
_FLOOR = 1e-20  # noise over signal, power, that counts as none: 200 dB


@dataclass(frozen=True)
class NetworkQuality:
    """What was measured on `examples` examples; None where it was not.

    accuracy, reference_accuracy, top1: shares. accuracy_change: this minus the reference's. kld_*:
    KL(reference || this) in nats. sqnr: of all outputs, in dB, 200 where there is no noise.
    relative_error: root of noise over signal. evaluate: what the user's own function says.

    Of a network with several outputs accuracy is of the first, `outputs` too; all else is the mean
    over them (of relative_error, before the root).
    """

    examples: int
    accuracy: Estimate | None = None
    reference_accuracy: Estimate | None = None
    accuracy_change: Estimate | None = None
    top1: Estimate | None = None
    kld_mean: Estimate | None = None
    kld_p99: Estimate | None = None
    sqnr: Estimate | None = None
    relative_error: Estimate | None = None
    evaluate: float | None = None
    outputs: Tensor | None = field(default=None, repr=False, compare=False)

    def as_dict(self) -> dict[str, int | float | dict[str, float | None]]:
        """Flat: name -> number, or {"value", "low", "high"}; what was not measured is left out.

        examples, accuracy, reference_accuracy, accuracy_change, top1_agreement (shares), mean_kld,
        p99_kld (nats), sqnr_db, relative_error, evaluate.
        """
        estimates = {
            "accuracy": self.accuracy,
            "reference_accuracy": self.reference_accuracy,
            "accuracy_change": self.accuracy_change,
            "top1_agreement": self.top1,
            "mean_kld": self.kld_mean,
            "p99_kld": self.kld_p99,
            "sqnr_db": self.sqnr,
            "relative_error": self.relative_error,
        }
        found: dict[str, Any] = {"examples": self.examples}
        found |= {name: e.as_dict() for name, e in estimates.items() if e is not None}
        return found if self.evaluate is None else found | {"evaluate": self.evaluate}


@torch.no_grad()
def outputs(
    network: Callable[[Tensor], Any], data: Tensor | Iterable[Any], size: int = 64
) -> Tensor:
    """What a network gives on all of `data`: (count, ...) float32 on the CPU; its first output
    where it has several. Raises WrongUse where it gives no tensor, BadInput without data."""
    return all_outputs(network, data, size)[0]


@torch.no_grad()
def all_outputs(
    network: Callable[[Tensor], Any], data: Tensor | Iterable[Any], size: int = 64
) -> tuple[Tensor, ...]:
    """The same of every output, the first one first."""
    device = getattr(network, "device", torch.device("cpu"))
    found = [_every(network(x)) for x in batches(data, size, device)]
    if not found:
        raise BadInput("there is no example to measure on", "give some data")
    return tuple(torch.cat(parts) for parts in zip(*found, strict=False))


def measure_network(
    network: Callable[[Tensor], Any],
    data: Tensor | Iterable[Any],
    labels: Tensor | None = None,
    *,
    reference: Callable[[Tensor], Any] | Tensor | Sequence[Tensor] | None = None,
    evaluate: Callable[[Any], float] | None = None,
    logits: bool | None = None,
    size: int = 64,
    seed: int = 0,
    resamples: int = 1000,
) -> NetworkQuality:
    """Run a network over `data` (count, ...) or batches of it, in batches of `size`, and compare.

    labels: (count,) classes, -100 where there is none. reference: another network, or what it gave
    on the same data (`outputs`, `all_outputs`). evaluate: called with the network instead of
    counting right answers, returns what counts. logits: whether outputs are logits, their classes
    last, or second of 4 and 5 dimensions; unless told, where they are (count, classes). `data` that
    can be gone through only once needs a reference that is a tensor. Raises UserError.
    """
    ours = all_outputs(network, data, size)
    theirs = all_outputs(reference, data, size) if callable(reference) else reference
    if evaluate is not None:
        labels = None
    found = compare_outputs(ours, labels, theirs, logits=logits, seed=seed, resamples=resamples)
    if evaluate is None:
        return found
    return replace(found, evaluate=score_of(evaluate(network)))


def compare_outputs(
    ours: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    reference: Tensor | Sequence[Tensor] | None = None,
    *,
    logits: bool | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> NetworkQuality:
    """The same from outputs (count, ...) that are there already: of one, or of several in order.

    KL(p || q) = Σ p log(p / q), p the reference's probabilities, the mean over positions where
    there are any; SQNR = Σ r² / Σ (r - o)² over all outputs of all examples, in dB. KL is there
    where all outputs are logits. Accuracy is that of the examples with a label: -100 marks what
    has none. Raises WrongUse for shapes that do not fit, BadInput for labels
    that are no class, BadOutput for outputs that are not finite.
    """
    mine, theirs = _flats(ours), None if reference is None else _flats(reference)
    first, plain = mine[0], all(x.ndim == 2 and x.shape[1] > 1 for x in mine)
    if logits is None:
        logits = labels is not None or plain
    if logits and (classes_last(first).shape[-1] < 2 or (labels is not None and first.ndim != 2)):
        raise WrongUse(
            f"outputs of shape {tuple(first.shape[1:])} are no logits of classes",
            "measure without labels, or with a function of your own: evaluate",
        )
    for x in mine:
        _finite("network", x)
    statistics: dict[str, Statistic] = {}
    labelled: dict[str, Statistic] = {}  # drawn from the examples with a label alone
    labels = known(labels)
    if labels is not None:
        right = _right(first, labels)
        labelled["accuracy"] = lambda i: right[i].mean()
    if theirs is not None:
        pairs = list(zip(mine, theirs, strict=False))
        for x, y in pairs:
            if x.shape != y.shape:
                raise WrongUse(
                    f"the network gives {tuple(x.shape)}, its reference {tuple(y.shape)}",
                    "both must run on the same data and give outputs of one shape",
                )
            _finite("reference", y)
        statistics |= _noise(pairs)
        if logits and all(classes_last(x).shape[-1] > 1 for x, _ in pairs):
            statistics |= _divergence(pairs)
        if labels is not None:
            before = _right(theirs[0], labels)
            labelled["reference_accuracy"] = lambda i: before[i].mean()
            labelled["accuracy_change"] = lambda i: right[i].mean() - before[i].mean()
    found = bootstrap(statistics, len(first), resamples=resamples, seed=seed) if statistics else {}
    if labels is not None:
        found |= bootstrap(labelled, len(right), resamples=resamples, seed=seed)
    return NetworkQuality(
        len(first),
        accuracy=found.get("accuracy"),
        reference_accuracy=found.get("reference_accuracy"),
        accuracy_change=found.get("accuracy_change"),
        top1=found.get("top1"),
        kld_mean=found.get("kld_mean"),
        kld_p99=found.get("kld_p99"),
        sqnr=found.get("sqnr"),
        relative_error=found.get("relative_error"),
        outputs=first,
    )


_Pairs = Sequence[tuple[Tensor, Tensor]]
"""Each output of a network, and the reference's."""


def _noise(pairs: _Pairs) -> dict[str, Statistic]:
    """Signal over noise; sums of each example are drawn again, not single outputs."""
    sums = []
    for ours, theirs in pairs:
        r, o = theirs.flatten(1).double(), ours.flatten(1).double()
        sums.append((_array(r.square().sum(1)), _array((r - o).square().sum(1))))

    def ratio(i: Any) -> float:
        total = 0.0
        for signal, noise in sums:
            power, error = float(signal[i].sum()), float(noise[i].sum())
            # Without a signal any noise is as large as can be, and none is none.
            total += max(error / power, _FLOOR) if power else (1 / _FLOOR if error else _FLOOR)
        return total / len(sums)

    def relative(i: Any) -> float:
        found = ratio(i)
        return 0.0 if found <= _FLOOR else math.sqrt(found)

    return {"sqnr": lambda i: -10 * math.log10(ratio(i)), "relative_error": relative}


def _divergence(pairs: _Pairs) -> dict[str, Statistic]:
    """KL divergence in nats and agreement on the likeliest class, of each example."""
    klds, sames = [], []
    for ours, theirs in pairs:
        parts = []
        ours, theirs = classes_last(ours), classes_last(theirs)
        size = max(1, _ROWS // max(1, ours.shape[1:-1].numel()))
        for start in range(0, len(ours), size):
            rows = slice(start, start + size)
            p = theirs[rows].double().log_softmax(-1)
            q = ours[rows].double().log_softmax(-1)
            parts.append(_each((p.exp() * (p - q)).sum(-1).clamp_min(0)))
        klds.append(_array(torch.cat(parts)))
        sames.append(_array(_each((ours.argmax(-1) == theirs.argmax(-1)).double())))
    kld, same = _mean(klds), _mean(sames)
    return {
        "top1": lambda i: same[i].mean(),
        "kld_mean": lambda i: kld[i].mean(),
        "kld_p99": lambda i: float(np.quantile(kld[i], 0.99)),
    }


def _each(x: Tensor) -> Tensor:
    """(count,): of each example the mean over its positions."""
    return x.flatten(1).mean(1) if x.ndim > 1 else x


def _mean(found: Sequence[Array]) -> Array:
    return found[0] if len(found) == 1 else np.stack(found).mean(0)


def _right(logits: Tensor, labels: Tensor) -> Array:
    """Of the examples with a label: 1 where the likeliest class is the label."""
    if labels.shape != (len(logits),):
        raise WrongUse(f"{len(logits)} examples and labels of shape {tuple(labels.shape)}")
    labels = labels.to(logits.device)
    check_classes(labels, logits.shape[1], "the data")
    at = (labels != IGNORED).nonzero()[:, 0]
    return _array(logits[at].argmax(1) == labels[at])


def _every(found: Any) -> list[Tensor]:
    """The outputs in what a network returned, the first one first, float32 on the CPU."""
    if isinstance(found, Mapping):
        found = {key: _tensor(x) for key, x in found.items()}
    else:
        found = [_tensor(x) for x in found] if isinstance(found, tuple | list) else _tensor(found)
    first = first_of(found)
    if first is None and found:  # names that say nothing of logits
        first = next(iter(found.values())) if isinstance(found, Mapping) else found[0]
    if not isinstance(first, Tensor):
        raise WrongUse(f"a network gave a {type(first).__name__}, not a tensor")
    if not first.ndim:
        raise WrongUse("a network gave one number for a whole batch", "one output an example")
    return [x.detach().float().cpu() for x in (first, *beside(found, first))]


def _tensor(x: Any) -> Any:
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def _flats(found: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [_flat(x) for x in ([found] if isinstance(found, Tensor) else found)]


def _flat(x: Tensor) -> Tensor:
    """Logits that come as (n, classes, 1, 1) as (n, classes)."""
    if not len(x):
        raise BadInput("there is no example to measure on", "give some data")
    return x.flatten(1) if x.ndim > 2 and math.prod(x.shape[2:]) == 1 else x


def _finite(who: str, x: Tensor) -> None:
    bad = int((~x.flatten(1).isfinite().all(1)).sum())
    if bad:
        raise BadOutput(f"the {who} gives NaN or infinite outputs for {bad} of {len(x)} examples")


def score_of(value: Any) -> float:
    """What a user's own `evaluate` returned, as a number; raises WrongUse, BadOutput."""
    try:
        found = float(value)
    except (TypeError, ValueError) as error:
        raise WrongUse(
            f"`evaluate` returned a {type(value).__name__}", "one number, higher is better"
        ) from error
    if math.isnan(found):
        raise BadOutput("`evaluate` returned NaN", "one number, higher is better")
    return found


def _array(t: Tensor) -> Array:
    return t.double().cpu().numpy()  # type: ignore[no-any-return]
