"""How good a student is on data held out: what the best state of a training is chosen by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lighten.errors import BadOutput, WrongUse
from lighten.intervals import standard_error
from lighten.network import Network, batches
from lighten.network_quality import score_of
from lighten.seen import IGNORED, log_probabilities, rows
from lighten.watch import outputs_of

MOST = 500_000_000
"""Bytes of a teacher's outputs that stay in memory; of more, the teacher runs each time."""


class Validation:
    """Called with the student, returns a number of which higher is better.

    measure: "evaluate", the user's own; "accuracy" where there are labels (of equal accuracy, less
    cross-entropy is better: it counts for less than half an example); else, where both give outputs
    of one shape, "mean_kld" from the teacher in nats, or "relative_error" where they are no logits.
    """

    def __init__(
        self,
        teacher: Network,
        student: Network,
        inputs: Tensor,
        labels: Tensor | None = None,
        evaluate: Callable[[Any], float] | None = None,
        batch: int = 128,
    ) -> None:
        """inputs: (count, ...). labels: (count,), IGNORED where there is none. Raises WrongUse,
        BadInput."""
        self.inputs, self.labels, self.evaluate, self.batch = inputs, labels, evaluate, batch
        self.teacher = teacher
        self._reference: list[Tensor] | None = None
        self.count = len(inputs) if labels is None else int((labels != IGNORED).sum())
        if evaluate is not None:
            self.measure = "evaluate"
            return
        if labels is not None and self.count:
            self.measure = "accuracy"
            return
        theirs, ours = (outputs_of(n(inputs[:2].to(n.device))) for n in (teacher, student))
        if theirs.shape != ours.shape:
            raise WrongUse(
                f"the student's outputs are {tuple(ours.shape)}, the teacher's"
                f" {tuple(theirs.shape)}: nothing says which student is better",
                "give data with labels, or a function of your own: evaluate",
            )
        self.measure = "mean_kld" if theirs.shape[-1] > 1 else "relative_error"
        size = theirs.numel() // len(theirs) * len(inputs) * 4
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
        """By how much chance alone may move a value: one standard error of an accuracy, else 0."""
        return standard_error(value, self.count) if self.measure == "accuracy" else 0.0

    def shown(self, value: float) -> float:
        """What `measure` says of a value of this."""
        if self.measure == "accuracy":
            return round(value * self.count) / self.count
        return value if self.measure == "evaluate" else -value

    def _accuracy(self, module: nn.Module) -> float:
        if self.labels is None:
            raise WrongUse("accuracy needs labels", "give data with labels")
        right, entropy = 0, 0.0
        for x, y in zip(self._outputs(module), torch.split(self.labels, self.batch), strict=True):
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
        noise, signal, count = 0.0, 0.0, 0
        theirs = self._outputs(self.teacher.module) if self._reference is None else self._reference
        for ours, wanted in zip(self._outputs(module), theirs, strict=True):
            if self.measure == "mean_kld":
                p, q = (log_probabilities(rows(x.double())) for x in (wanted, ours))
                noise += float((p.exp() * (p - q)).sum())
                count += len(p)
            else:
                noise += float((ours - wanted).double().square().sum())
                signal += float(wanted.double().square().sum())
        if self.measure == "mean_kld":
            return max(0.0, noise / count)
        return float((noise / max(signal, 1e-30)) ** 0.5)

    def _outputs(self, module: nn.Module) -> Any:
        """Batch by batch, float32 on the CPU."""
        device = next(module.parameters()).device
        for x in batches(self.inputs, self.batch, device):
            found = outputs_of(module(x)).float().cpu()
            if not bool(torch.isfinite(found).all()):
                raise BadOutput("the network gives NaN or infinite outputs")
            yield found
