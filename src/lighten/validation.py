"""How good a student is on data held out: what the best state of a training is chosen by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lighten.errors import BadOutput, WrongUse
from lighten.intervals import by_chance
from lighten.network import Network, batches
from lighten.network_quality import score_of
from lighten.seen import IGNORED, log_probabilities, rows
from lighten.watch import every_output

MOST = 500_000_000
"""Bytes of a teacher's outputs that stay in memory; of more, the teacher runs each time."""


class Validation:
    """Called with the student, returns a number of which higher is better.

    measure: "evaluate", the user's own; "accuracy" where there are labels (of equal accuracy, less
    cross-entropy is better: it counts for less than half an example); else, where both give outputs
    of one shape, "mean_kld" from the teacher in nats, or "relative_error" where they are no logits.
    Accuracy is of the first output, the distances are the mean over all that both networks have.
    """

    def __init__(
        self,
        teacher: Network,
        student: Network,
        inputs: Tensor,
        labels: Tensor | None = None,
        evaluate: Callable[[Any], float] | None = None,
        batch: int = 128,
        logits: bool = True,
    ) -> None:
        """inputs: (count, ...). labels: (count,), IGNORED where there is none. logits: whether
        outputs with classes are logits of them. Raises WrongUse, BadInput."""
        self.inputs, self.labels, self.evaluate, self.batch = inputs, labels, evaluate, batch
        self.teacher = teacher
        self._reference: list[tuple[Tensor, ...]] | None = None
        self.count = len(inputs) if labels is None else int((labels != IGNORED).sum())
        if evaluate is not None:
            self.measure = "evaluate"
            return
        if labels is not None and self.count:
            self.measure = "accuracy"
            return
        theirs, ours = (every_output(n(inputs[:2].to(n.device))) for n in (teacher, student))
        for x, y in zip(theirs, ours, strict=False):
            if x.shape != y.shape:
                raise WrongUse(
                    f"the student's outputs are {tuple(y.shape)}, the teacher's"
                    f" {tuple(x.shape)}: nothing says which student is better",
                    "give data with labels, or a function of your own: evaluate",
                )
        logits = logits and all(x.shape[-1] > 1 for x in theirs[: len(ours)])
        self.measure = "mean_kld" if logits else "relative_error"
        size = sum(x.numel() // len(x) * len(inputs) * 4 for x in theirs)
        if size <= MOST:
            self._reference = list(self._outputs(teacher.module))

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> float:
        """Raises BadOutput where outputs are not finite."""
        if self.evaluate is not None:
            device = next(module.parameters()).device
            own = Network(module, (self.inputs[:1].to(device),))
            return score_of(self.evaluate(own))
        if self.measure == "accuracy":
            return self._accuracy(module)
        return -self._distance(module)

    def margin(self, value: float) -> float:
        """By how much chance alone may move a value: two standard errors of an accuracy, else 0."""
        return by_chance(value, self.count) if self.measure == "accuracy" else 0.0

    def shown(self, value: float) -> float:
        """What `measure` says of a value of this."""
        if self.measure == "accuracy":
            return round(value * self.count) / self.count
        return value if self.measure == "evaluate" else -value

    def _accuracy(self, module: nn.Module) -> float:
        if self.labels is None:
            raise WrongUse("accuracy needs labels", "give data with labels")
        right, entropy = 0, 0.0
        batches = zip(self._outputs(module), torch.split(self.labels, self.batch), strict=True)
        for (x, *_), y in batches:
            known = y != IGNORED
            found, wanted = x[known], y[known]
            if found.ndim != 2:
                raise WrongUse(
                    f"outputs {tuple(x.shape)} and labels {tuple(y.shape)} are not of each other",
                    "one label for each example, or a function of your own: evaluate",
                )
            right += int((found.argmax(1) == wanted).sum())
            entropy += float(F.cross_entropy(found, wanted, reduction="sum"))
        mean = entropy / self.count
        return right / self.count - 0.5 * mean / (1 + mean) / self.count

    def _distance(self, module: nn.Module) -> float:
        noise, whole = defaultdict[int, float](float), defaultdict[int, float](float)
        theirs = self._outputs(self.teacher.module) if self._reference is None else self._reference
        for found, expected in zip(self._outputs(module), theirs, strict=True):
            for i, (ours, wanted) in enumerate(zip(found, expected, strict=False)):
                if self.measure == "mean_kld":
                    p, q = (log_probabilities(rows(x.double())) for x in (wanted, ours))
                    noise[i] += float((p.exp() * (p - q)).sum())
                    whole[i] += len(p)
                else:
                    noise[i] += float((ours - wanted).double().square().sum())
                    whole[i] += float(wanted.double().square().sum())
        if self.measure == "mean_kld":
            return sum(max(0.0, noise[i] / whole[i]) for i in noise) / len(noise)
        return float((sum(noise[i] / max(whole[i], 1e-30) for i in noise) / len(noise)) ** 0.5)

    def _outputs(self, module: nn.Module) -> Iterator[tuple[Tensor, ...]]:
        """Batch by batch all outputs, float32 on the CPU."""
        device = next(module.parameters()).device
        for x in batches(self.inputs, self.batch, device):
            found = tuple(y.float().cpu() for y in every_output(module(x)))
            if not all(bool(torch.isfinite(y).all()) for y in found):
                raise BadOutput("the network gives NaN or infinite outputs")
            yield found
