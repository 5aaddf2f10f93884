"""How good a network is, and how far from another: accuracy, agreement, divergence, noise.

Whatever is called on a batch and returns a tensor or an array can be measured: a network, the
simulation of a quantized one, a session of onnxruntime. Examples are drawn again for the intervals,
the same ones for both networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lighten.errors import BadInput, BadOutput, WrongUse
from lighten.intervals import Array, Estimate, Statistic, bootstrap
from lighten.loaders import known
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
    device = getattr(network, "device", torch.device("cpu"))
    found = [_first(network(x)) for x in batches(data, size, device)]
    if not found:
        raise BadInput("there is no example to measure on", "give some data")
    return torch.cat(found)


def measure_network(
    network: Callable[[Tensor], Any],
    data: Tensor | Iterable[Any],
    labels: Tensor | None = None,
    *,
    reference: Callable[[Tensor], Any] | Tensor | None = None,
    evaluate: Callable[[Any], float] | None = None,
    logits: bool | None = None,
    size: int = 64,
    seed: int = 0,
    resamples: int = 1000,
) -> NetworkQuality:
    """Run a network over `data` (count, ...) or batches of it, in batches of `size`, and compare.

    labels: (count,) classes, -100 where there is none. reference: another network, or what it gave
    on the same data (`outputs`). evaluate: called with the network instead of counting right
    answers, returns what counts. logits: whether outputs are logits; unless told, where they are
    (count, classes). `data` that can be gone through only once needs a reference that is a tensor.
    Raises UserError.
    """
    ours = outputs(network, data, size)
    theirs = reference
    if theirs is not None and not isinstance(theirs, Tensor):
        theirs = outputs(theirs, data, size)
    if evaluate is not None:
        labels = None
    found = compare_outputs(ours, labels, theirs, logits=logits, seed=seed, resamples=resamples)
    if evaluate is None:
        return found
    return replace(found, evaluate=score_of(evaluate(network)))


def compare_outputs(
    ours: Tensor,
    labels: Tensor | None = None,
    reference: Tensor | None = None,
    *,
    logits: bool | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> NetworkQuality:
    """The same from outputs (count, ...) that are there already.

    KL(p || q) = Σ p log(p / q), p the reference's probabilities; SQNR = Σ r² / Σ (r - o)² over all
    outputs of all examples, in dB. Accuracy is that of the examples with a label: -100 marks what
    has none. Raises WrongUse for shapes that do not fit, BadInput for labels
    that are no class, BadOutput for outputs that are not finite.
    """
    ours, theirs = _flat(ours), None if reference is None else _flat(reference)
    if logits is None:
        logits = labels is not None or (ours.ndim == 2 and ours.shape[1] > 1)
    if logits and (ours.ndim != 2 or ours.shape[1] < 2):
        raise WrongUse(
            f"outputs of shape {tuple(ours.shape[1:])} are no logits of classes",
            "measure without labels, or with a function of your own: evaluate",
        )
    _finite("network", ours)
    statistics: dict[str, Statistic] = {}
    labelled: dict[str, Statistic] = {}  # drawn from the examples with a label alone
    labels = known(labels)
    if labels is not None:
        right = _right(ours, labels)
        labelled["accuracy"] = lambda i: right[i].mean()
    if theirs is not None:
        if theirs.shape != ours.shape:
            raise WrongUse(
                f"the network gives {tuple(ours.shape)}, its reference {tuple(theirs.shape)}",
                "both must run on the same data and give outputs of one shape",
            )
        _finite("reference", theirs)
        statistics |= _noise(ours, theirs)
        if logits:
            statistics |= _divergence(ours, theirs)
        if labels is not None:
            before = _right(theirs, labels)
            labelled["reference_accuracy"] = lambda i: before[i].mean()
            labelled["accuracy_change"] = lambda i: right[i].mean() - before[i].mean()
    found = bootstrap(statistics, len(ours), resamples=resamples, seed=seed) if statistics else {}
    if labels is not None:
        found |= bootstrap(labelled, len(right), resamples=resamples, seed=seed)
    return NetworkQuality(
        len(ours),
        accuracy=found.get("accuracy"),
        reference_accuracy=found.get("reference_accuracy"),
        accuracy_change=found.get("accuracy_change"),
        top1=found.get("top1"),
        kld_mean=found.get("kld_mean"),
        kld_p99=found.get("kld_p99"),
        sqnr=found.get("sqnr"),
        relative_error=found.get("relative_error"),
        outputs=ours,
    )


def _noise(ours: Tensor, theirs: Tensor) -> dict[str, Statistic]:
    """Signal over noise; sums of each example are drawn again, not single outputs."""
    r, o = theirs.flatten(1).double(), ours.flatten(1).double()
    signal, noise = _array(r.square().sum(1)), _array((r - o).square().sum(1))

    def ratio(i: Any) -> float:
        power, error = float(signal[i].sum()), float(noise[i].sum())
        # Without a signal any noise is as large as can be, and none is none.
        return max(error / power, _FLOOR) if power else (1 / _FLOOR if error else _FLOOR)

    def relative(i: Any) -> float:
        found = ratio(i)
        return 0.0 if found <= _FLOOR else math.sqrt(found)

    return {"sqnr": lambda i: -10 * math.log10(ratio(i)), "relative_error": relative}


def _divergence(ours: Tensor, theirs: Tensor) -> dict[str, Statistic]:
    """KL divergence in nats and agreement on the likeliest class."""
    parts = []
    for start in range(0, len(ours), _ROWS):
        rows = slice(start, start + _ROWS)
        p = theirs[rows].double().log_softmax(1)
        q = ours[rows].double().log_softmax(1)
        parts.append((p.exp() * (p - q)).sum(1).clamp_min(0))
    kld = _array(torch.cat(parts))
    same = _array(ours.argmax(1) == theirs.argmax(1))
    return {
        "top1": lambda i: same[i].mean(),
        "kld_mean": lambda i: kld[i].mean(),
        "kld_p99": lambda i: float(np.quantile(kld[i], 0.99)),
    }


def _right(logits: Tensor, labels: Tensor) -> Array:
    """Of the examples with a label: 1 where the likeliest class is the label."""
    if labels.shape != (len(logits),):
        raise WrongUse(f"{len(logits)} examples and labels of shape {tuple(labels.shape)}")
    labels = labels.to(logits.device)
    at = (labels != IGNORED).nonzero()[:, 0]
    logits, labels = logits[at], labels[at]
    wrong = (labels < 0) | (labels >= logits.shape[1])
    if bool(wrong.any()):
        raise BadInput(
            f"labels reach from {int(labels.min())} to {int(labels.max())}, in example"
            f" {int(at[wrong][0])} first, and the network has {logits.shape[1]} classes",
            f"is the data of another set of classes? {IGNORED} marks what has no label",
        )
    return _array(logits.argmax(1) == labels)


def _first(found: Any) -> Tensor:
    """The first tensor of what a network returned, float32 on the CPU."""
    if isinstance(found, Mapping) and found:
        found = found.get("logits", next(iter(found.values())))
    elif isinstance(found, tuple | list) and found:
        found = found[0]
    if isinstance(found, np.ndarray):
        found = torch.from_numpy(found)
    if not isinstance(found, Tensor):
        raise WrongUse(f"a network gave a {type(found).__name__}, not a tensor")
    if not found.ndim:
        raise WrongUse("a network gave one number for a whole batch", "one output an example")
    return found.detach().float().cpu()


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
