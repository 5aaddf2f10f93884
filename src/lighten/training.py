"""A training step by step: what one step does, when it is judged, what a checkpoint holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lighten.borrowed import send
from lighten.breakdown import BrokeDown, broke_down
from lighten.errors import BadOutput
from lighten.event_log import EventLog
from lighten.feed import Batch, Feed
from lighten.learn_state import (
    Checkpoints,
    join_state,
    load_optimizer,
    optimizer_state,
    split_state,
)
from lighten.learning_rate import rate_at
from lighten.lesson import Lesson, Parts, Seen
from lighten.moving_average import MovingAverage
from lighten.optimizers import Grouped, make_optimizer, set_rate
from lighten.progress import note, stage
from lighten.schedules import Stepped
from lighten.seeds import seed_of
from lighten.sharding import Shards, agree, check_optimizer, clip, fill, gathered, spreads
from lighten.showing import Showing, channels_last, laid_out, lay_out, set_mode, tensors_in

Hook = Callable[[int, int], None]
"""Called with (steps done, steps in all). One with state_dict and load_state_dict is kept in
checkpoints."""

ROWS = 200
"""About how many rows the history of a training has."""


@dataclass(eq=False)
class Training:
    """A training in progress."""

    fabric: Any
    student: nn.Module
    teacher: Callable[[Any], Any] | None
    lesson: Lesson
    feed: Feed
    evaluate: Callable[[nn.Module], float]
    steps: int
    every: int
    rate: float
    seed: int
    warm_up: float
    clip: float | None
    patience: int | None
    penalty: Callable[[], Tensor] | None
    keep_given: bool
    before_step: Sequence[Hook]
    after_step: Sequence[Hook]
    save_every: int | None
    seconds: float
    accept_broken: bool = False
    step: int = 0
    first: float = 0.0
    best: float = 0.0  # of the state that is kept
    best_step: int = 0
    top: float = 0.0  # the highest value seen, of a state before it maybe
    waited: int = 0  # evaluations since the best
    done: bool = False
    sums: dict[str, float] = field(default_factory=dict)
    summed: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    kept: Checkpoints | None = None
    log: EventLog | None = None
    average: MovingAverage | None = None
    columns: bool = False  # channels last in memory
    shards: Shards | None = None
    folder: Path | None = None
    broke: str = ""  # why it ended early, with the best state before

    # -- begin, go on, end ---------------------------------------------------------------------
    def begin(
        self, optimizer: str, decay: float | None, group: Grouped, average: float | None,
        folder: Path | None, request: dict[str, Any],
    ) -> None:  # fmt: skip
        """Set up, and load the last state where there is one."""
        self.saved = time.monotonic()
        fabric = self.fabric
        self.folder = folder
        if folder is not None and fabric.is_global_zero:
            self.kept = Checkpoints(folder, request)
        send(self.student, fabric.device)
        if isinstance(self.teacher, nn.Module):
            send(self.teacher, fabric.device)
            set_mode(self.teacher, False)
        self.best_state = copied(self.student)
        torch.manual_seed(seed_of(self.seed, "step", 0, fabric.global_rank))
        self.ahead: list[Batch] | None = self.feed.at(0)
        inputs, _ = self._sent(self.ahead[0])
        networks = [m for m in (self.student, self.teacher) if isinstance(m, nn.Module)]
        # shares are of rows, which channels last in memory would cut through
        spread = spreads(fabric)
        self.columns = not spread and all(channels_last(module, inputs) for module in networks)
        if not self.columns:
            self._lay_back()
        self.showing = Showing(self.student, self.teacher, self.lesson, inputs, fabric.autocast)
        self.parts: Parts = self.showing.parts(inputs, self.seed).to(fabric.device)
        self.shards = Shards(self.showing.module) if spread else None
        self.showing.module.spread = spread
        self.module = fabric.setup_module(self.showing.module)
        if self.shards is not None:
            self.shards.began()
        named = [
            *((f"student.{n}", p) for n, p in self.student.named_parameters() if p.requires_grad),
            *((f"parts.{n}", p) for n, p in self.parts.named_parameters()),
        ]
        self.names = {p: n for n, p in named}
        made = make_optimizer(optimizer, named, decay, group)
        if spread:
            check_optimizer(optimizer)
        self.optimizer = fabric.setup_optimizers(made)
        self.average = None if average is None else MovingAverage(self.student, average)
        last = None if self.kept is None else self.kept.last()
        last = fabric.broadcast(last) if fabric.world_size > 1 else last
        if last is None:
            self.first = self._value("the network that was given")
            self.best = self.top = self.first if self.keep_given else -float("inf")
        else:
            self._load(*last)
        if self.kept is not None and folder is not None:
            self.history = self.kept.rows(self.step)
            self.log = None if self.done else EventLog(folder / "tensorboard", self.step)

    def go(self, name: str) -> None:
        """All steps that are left. Raises BrokeDown for a loss that is not finite, unless that is
        accepted: then it ends there."""
        try:
            self._go(name)
        except BrokeDown as error:
            if not self.accept_broken:
                raise
            self.broke = error.message
            if not self.best_step:
                self.best = self.first
            note(f"{error.message}: it ends here, with the best state before")
            return
        if self.kept is not None and not self.done:
            self.done = True
            self.kept.save(self.step, {}, self._facts())

    def _go(self, name: str) -> None:
        with stage(name, self.steps, "steps") as tick:
            tick(self.step)
            while self.step < self.steps and not self.done:
                self._call(self.before_step)
                with nullcontext() if self.shards is None else self.shards.trial():
                    self._learn()
                self.step += 1
                self._call(self.after_step)
                self._press()
                if self.average is not None:
                    self.average.update(self.student, self.step)
                self._look()
                tick()

    def end(self) -> None:
        """Put the best state in place, in the usual layout."""
        if self.shards is not None:
            self.shards.end()
        if hasattr(self, "best_state"):
            with torch.no_grad():
                self.student.load_state_dict(self.best_state)
            self._lay_back()
        if hasattr(self, "showing"):
            self.showing.close()
        if self.log is not None:
            self.log.close()

    def _lay_back(self) -> None:
        for module in (self.student, self.teacher):
            if isinstance(module, nn.Module):
                lay_out(module, torch.contiguous_format)

    def _whole(self, write: bool = False) -> AbstractContextManager[None]:
        """The student as a module of its own, where it is spread over processes."""
        return nullcontext() if self.shards is None else self.shards.whole(write)

    def _call(self, hooks: Sequence[Hook]) -> None:
        if hooks:
            with self._whole(write=True):
                for hook in hooks:
                    hook(self.step, self.steps)

    @property
    def charged(self) -> Callable[[], Tensor] | None:
        """What is added to the loss: no penalty that takes a proximal step instead."""
        return None if getattr(self.penalty, "proximal", False) else self.penalty

    def _press(self) -> None:
        """The step of a penalty that has one: it grows, or shrinks weights."""
        if isinstance(self.penalty, Stepped):
            with self._whole(write=True):
                self.penalty.step(self.step, self.optimizer.optimizer)

    # -- one step ------------------------------------------------------------------------------
    def _learn(self) -> None:
        fabric, step = self.fabric, self.step
        set_mode(self.module, True)
        torch.manual_seed(seed_of(self.seed, "step", step, fabric.global_rank))
        parts = self.ahead if step == 0 and self.ahead is not None else self.feed.at(step)
        self.ahead = None
        self.optimizer.zero_grad()
        set_rate(self.optimizer, rate_at(step, self.steps, self.rate, self.warm_up))
        sizes = [len(tensors_in(inputs)[0]) for inputs, _ in parts]
        found: dict[str, float] = {}
        for i, part in enumerate(parts):
            inputs, labels = self._sent(part)
            with fabric.no_backward_sync(self.module, enabled=i + 1 < len(parts)):
                total, values = self._loss(inputs, labels)
                fabric.backward(total * (sizes[i] / sum(sizes)))
            row = torch.stack([total.detach(), *values.values()]).float()
            row = fabric.all_reduce(row, reduce_op="mean") if fabric.world_size > 1 else row
            for key, value in zip(("loss", *values), row.tolist(), strict=True):
                found[key] = found.get(key, 0.0) + value * sizes[i] / sum(sizes)
        if self.shards is not None and self.charged is not None:
            found["loss"] += self.shards.charge(self.charged)
        if not all(abs(value) < float("inf") for value in found.values()):
            self._stop(", ".join(f"{k} {v:.4g}" for k, v in found.items()))
        if fabric.world_size > 1:
            loose = () if self.shards is None else self.shards.loose
            for parameter in (*self.parts.parameters(), *loose):
                if parameter.grad is not None:
                    parameter.grad = fabric.all_reduce(parameter.grad, reduce_op="mean")
        if self.clip is not None and self.shards is not None:
            clip(self.names, self.clip)
        elif self.clip is not None:
            torch.nn.utils.clip_grad_norm_(list(self.names), self.clip)
        self.optimizer.step()
        self.sums = {k: self.sums.get(k, 0.0) + v for k, v in found.items()}
        self.summed += 1

    def _loss(self, inputs: Any, labels: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        taught = self.showing.taught(inputs)
        seen = Seen(**self.module(inputs))
        total, values = self.parts(seen, taught, labels)
        penalty = self.charged if self.shards is None else None
        return (total if penalty is None else total + penalty()), values

    def _sent(self, batch: Batch) -> tuple[Any, Tensor | None]:
        """A batch on the device, images laid out as the weights are."""
        inputs, labels = self.fabric.to_device(batch)
        if self.columns:
            inputs = torch.utils._pytree.tree_map_only(Tensor, laid_out, inputs)
        return inputs, labels

    # -- what comes of it ----------------------------------------------------------------------
    def _look(self) -> None:
        """Log, evaluate, save, where it is time."""
        judged = self.step % self.every == 0 or self.step == self.steps
        if judged or self.step % max(1, self.steps // ROWS) == 0:
            row: dict[str, Any] = {"step": self.step}
            row |= {k: v / self.summed for k, v in self.sums.items()}
            row["rate"] = rate_at(self.step - 1, self.steps, self.rate, self.warm_up)
            self.sums, self.summed = {}, 0
            if judged:
                row |= self._judge()
            self.history.append(row)
            if self.kept is not None:
                self.kept.append(row)
            if self.log is not None:
                self.log.add(row)
        stopped = self.patience is not None and self.waited >= self.patience
        self.done = self.step == self.steps or stopped
        due = judged or (self.save_every is not None and self.step % self.save_every == 0)
        if self.folder is not None and (due or self._late()):
            tensors = {} if self.done else self._tensors()
            if self.kept is not None:
                self.kept.sync()
                self.kept.save(self.step, tensors, self._facts())
            self.saved = time.monotonic()

    def _late(self) -> bool:
        """Whether the last state is old; of shares, all processes must store at once."""
        late = time.monotonic() - self.saved > self.seconds
        return late if self.shards is None else bool(self.fabric.broadcast(late))

    def _judge(self) -> dict[str, float]:
        """Evaluate the weights, and their average; keep what is better than all before."""
        found = {"held_out": self._value("the student")}
        before, top = self.best_step, self.top
        self._keep(found["held_out"])
        if self.average is not None:
            with self.average.inside(self.student):
                found["held_out_average"] = self._value("the average of its weights")
                self._keep(found["held_out_average"])
        self.waited = 0 if self.top > top else self.waited + 1
        if self.best_step != before and self.kept is not None:
            self.kept.save_best(self.step, self.best_state)
        return found

    def _keep(self, value: float) -> None:
        """Keep the state if it is the best, or a later one that chance may have put below it.

        Towards the end rates fall, and states get better: of two that held-out data cannot tell
        apart the later one is the better guess. None below the one that was given is kept.
        """
        margin = getattr(self.evaluate, "margin", None)
        apart = 0.0 if margin is None else margin(self.top)
        later = self.best_step < self.step and value >= self.top - apart
        if value > self.best or (self.best_step and later and value > self.first):
            self.best, self.best_step, self.best_state = value, self.step, copied(self.student)
        self.top = max(self.top, value)

    @torch.no_grad()
    def _value(self, what: str) -> float:
        if self.fabric.world_size > 1:
            agree(self.student)
        set_mode(self.student, False)
        try:
            with self._whole():
                value = float(self.evaluate(self.student))
            value = float(self.fabric.broadcast(value))
        except BadOutput as error:
            self._stop(f"{what} cannot be judged: {error.message}")
        if value != value:
            self._stop(f"the evaluation of {what} is NaN")
        return value

    def _stop(self, why: str) -> None:
        raise broke_down(why, self.step, self.steps, self.rate, self.best_step, self.folder)

    # -- checkpoints ---------------------------------------------------------------------------
    def _tensors(self) -> dict[str, Tensor]:
        if self.shards is None and self.kept is None:
            return {}  # another process stores what it has itself
        found = {f"student/{k}": gathered(v) for k, v in self.student.state_dict().items()}
        found |= {f"parts/{k}": v for k, v in self.parts.state_dict().items()}
        state = optimizer_state(self.optimizer.optimizer, self.names)
        found |= {f"optimizer/{k}": v for k, v in state.items()}
        if self.average is not None:
            found |= {f"average/{k}": gathered(v) for k, v in self.average.values.items()}
        return found | self._hooks()[1]

    def _facts(self) -> dict[str, Any]:
        return {
            "step": self.step, "first": self.first, "best": self.best, "best_step": self.best_step,
            "top": self.top, "waited": self.waited, "done": self.done, "sums": self.sums,
            "summed": self.summed, "hooks": {} if self.done else self._hooks()[0],
        }  # fmt: skip

    def _stateful(self) -> dict[str, Any]:
        hooks = [*self.before_step, *self.after_step, self.penalty]
        return {str(i): hook for i, hook in enumerate(hooks) if hasattr(hook, "state_dict")}

    def _hooks(self) -> tuple[Any, dict[str, Tensor]]:
        return split_state({k: h.state_dict() for k, h in self._stateful().items()}, "hooks")

    def _load(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        for key in (
            "step",
            "first",
            "best",
            "best_step",
            "top",
            "waited",
            "done",
            "sums",
            "summed",
        ):
            setattr(self, key, facts[key])
        if self.best_step and self.kept is not None:
            self.best_state = self.kept.best(self.best_step)
        self.best_state = self.fabric.broadcast(self.best_state)
        if self.done:
            return
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition("/")
            parts.setdefault(kind, {})[rest] = tensor
        fill(self.student, parts["student"])
        self.parts.load_state_dict(parts.get("parts", {}))
        load_optimizer(self.optimizer.optimizer, self.names, parts.get("optimizer", {}))
        if self.average is not None:
            self.average.load(parts["average"])
        states = join_state(facts["hooks"], tensors)
        for key, hook in self._stateful().items():
            hook.load_state_dict(states[key])


def copied(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module, on the CPU, memory of its own."""
    return {k: gathered(v).cpu().clone() for k, v in module.state_dict().items()}
