"""What a distillation is asked for: everything opened, read and checked before anything is learned.

Mistakes are cheap here: labels that are no class, outputs that cannot match, a lesson that needs
what is not there, data that ends early.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lighten.atomic import dump, file_name
from lighten.course import ImageCourse
from lighten.devices import need_lightning, several
from lighten.errors import UserError, WrongUse
from lighten.front import is_network, loaded
from lighten.images import Images, normalised
from lighten.length import Length
from lighten.lesson import Lesson
from lighten.loaders import check_classes
from lighten.mirrored import mirrors
from lighten.network import Network
from lighten.registry import exporters
from lighten.samples import Samples, samples
from lighten.seeds import seed_of
from lighten.students import StudentSpec
from lighten.teach import Hyperparameters, batch_of, check_lesson
from lighten.training_data import TrainingData, collected, training_data
from lighten.tune import check_tunable
from lighten.usual_lesson import check_outputs, check_student, lesson_for
from lighten.watch import outputs_of

_FEW = 8
"""Examples that a lesson is tried on."""

_NETWORKS = "a torch.nn.Module, package.module:factory, file.py:factory or a .pt2 file"


@dataclass(frozen=True, eq=False)
class Request:
    """teacher and student are lighten's own copies. data: what is learned from and chosen by,
    samples: what is measured on. wanted: what another request differs in."""

    teacher: Network
    student: Network | StudentSpec
    data: TrainingData
    samples: Samples
    lesson: Lesson
    length: Length
    trials: int | None
    export: str | None
    how: Hyperparameters
    multiple: int
    evaluate: Callable[[Any], float] | None
    wanted: dict[str, Any]

    @property
    def exporter(self) -> Any:
        return None if self.export is None else exporters[self.export]

    @property
    def folder(self) -> Path:
        """Where the run goes that was given no folder: its own for every request."""
        of = self.student if isinstance(self.student, StudentSpec) else self.student.source
        name = str(of).rpartition(":")[2].partition("(")[0].replace(", ", "-").replace(" ", "-")
        key = sha256(dump(self.wanted).encode()).hexdigest()[:8]
        return Path("runs") / file_name(f"{name}-taught-{key}")

    def check(self, student: Network) -> None:
        """Raises WrongUse or BadInput where this student cannot learn what it is to learn."""
        inputs = tuple(x.to(student.device) for x in self.teacher.inputs)
        try:
            shown = outputs_of(student(*inputs))
        except UserError:
            raise
        except Exception as error:  # a forward may fail in any way it likes
            raise WrongUse(
                f"the student does not run on the teacher's inputs"
                f" {[tuple(x.shape) for x in inputs]}: {type(error).__name__}: {error}",
                "both are called with the same examples",
            ) from error
        check_outputs(self.lesson, student)
        check_student(student, self.teacher)
        course = self.data.course
        self.data.check(shown.shape[-1], "student")
        check_classes(self.samples.labels, shown.shape[-1], "what is measured on", "student")
        batch_of(student, self.data, self.how)
        few = torch.arange(min(_FEW, course.count))
        x, y = course.batch(few, torch.Generator().manual_seed(0))
        check_lesson(student, self.teacher, self.lesson, x, y)
        mirrors(self.how.mirrored, self.teacher, self.lesson, course)
        if self.exporter is not None and (why := self.exporter.refuses(student)):
            raise WrongUse(f"`{self.export}` cannot hold this student: {why}", "--export onnx")


def read(
    teacher: Any, student: Any, data: Any, *, example_inputs: Any, length: str,
    learn_from: str | None, temperature: float | None, trials: int | None, test: Any,
    evaluate: Callable[[Any], float] | None, export: str | None, augment: str | None,
    how: Hyperparameters, multiple: int, teacher_weights: str | Path | None,
    student_weights: str | Path | None, size: int | None, mean: Any, std: Any, crop: Any,
    samples: int,
) -> Request:  # fmt: skip
    """Read what a user wrote; raises UserError. See lighten.distill."""
    need_lightning()
    span, spec = Length.parse(length), _spec(student)
    written = None if learn_from is None else Lesson.parse(learn_from, temperature)
    if trials is not None and several(how.devices, how.accelerator):
        raise WrongUse(
            f"trials run on one device, and devices={how.devices}",
            "tune on one, then give what was found as learn_from, on several",
        )
    if export is not None:
        _ = exporters[export]
    if data is None:
        raise WrongUse("there is nothing to learn from", "--data images.parquet; data=loader")
    if spec is not None and student_weights is not None:
        raise WrongUse(
            f"student_weights, and the student is made from its teacher: {spec}",
            "name the student's factory, or leave its weights out",
        )
    if not isinstance(data, str | Path):
        data = collected(data)
        if example_inputs is None and size is None:
            example_inputs = _first(data)
    master = _opened("teacher", teacher, teacher_weights, example_inputs, size, how.seed)
    lesson = lesson_for(written, master, temperature)
    if trials is not None:
        check_tunable(lesson, trials)
    learner: Network | StudentSpec = spec or _on(
        _opened("student", student, student_weights, master.inputs, None, how.seed), master.device
    )
    parts = [
        collected(loaded(part, master, size=size, mean=mean, std=std, crop=crop))
        if part is not None
        else None
        for part in (data, test)
    ]
    source = str(data) if isinstance(data, str | Path) else ""
    measured = _measured_on(parts[0], parts[1], samples, source, how.seed, master)
    found = training_data(
        parts[0], calibration=samples, tested=test is not None, seed=how.seed,
        augment=augment or "auto", source=source,
    )  # fmt: skip
    found.course.check(lesson.needs)
    wanted = {
        "teacher": master.digest, "student": str(spec) if spec else learner.digest,  # type: ignore[union-attr]
        "source": master.source, "learn_from": str(lesson), "length": str(span), "tune": trials,
        "export": export, "augment": found.course.augment, "multiple": multiple,
        "data": found.digest, "measured_on": measured.digest,
        "evaluate": getattr(evaluate, "__qualname__", evaluate and "given"),
        "inputs": [list(x.shape) for x in master.inputs],
        **dataclasses.asdict(how), "rate": how.rate_used,
    }  # fmt: skip
    return Request(
        master, learner, found, measured, lesson, span, trials, export, how, multiple, evaluate,
        wanted,
    )  # fmt: skip


def _spec(student: Any) -> StudentSpec | None:
    if isinstance(student, StudentSpec):
        return student
    if isinstance(student, str) and StudentSpec.meant(student):
        return StudentSpec.parse(student)
    if not isinstance(student, nn.Module | Network) and not is_network(student):
        raise WrongUse(
            f"`{student}` is no student", f'"half depth, half width" of the teacher, or {_NETWORKS}'
        )
    return None


def _opened(
    who: str, model: Any, weights: str | Path | None, inputs: Any, size: int | None, seed: int
) -> Network:
    """A network; what a factory draws is the same for a seed, so that a run can be resumed."""
    from lighten.front import opened

    if not is_network(model):
        raise WrongUse(f"`{model}` is no {who}", f"give {_NETWORKS}")
    if weights is not None and not isinstance(model, str | Path):
        raise WrongUse(f"{who}_weights, and the {who} is no factory", "load them into the module")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, who))
        return opened(model, inputs, weights, size)


def _on(network: Network, device: torch.device) -> Network:
    network.module.to(device)
    return Network(
        network.module, tuple(x.to(device) for x in network.inputs), network.source, network.notes
    )


def _first(data: Any) -> Tensor:
    """Two examples as a network takes them."""
    if isinstance(data, Images):
        return data.tensor(slice(0, 2))
    x = data[0] if isinstance(data, tuple) else data
    found, _ = ImageCourse(x[:2]).batch(torch.arange(min(2, len(x))), torch.Generator())
    return found


def _measured_on(
    data: Any, test: Any, count: int, source: str, seed: int, teacher: Network
) -> Samples:
    found = samples(data, test=test, calibration=count, seed=seed, source=source)
    if found.calibration.dtype == torch.uint8:
        plain = ((0.0,), (1.0,))
        found = replace(
            found,
            calibration=normalised(found.calibration, *plain),
            held_out=normalised(found.held_out, *plain),
        )
    shape = tuple(teacher.inputs[0].shape[1:])
    if tuple(found.calibration.shape[1:]) != shape:
        raise WrongUse(
            f"the data is {tuple(found.calibration.shape[1:])} and the teacher takes {shape}",
            "give --size, or example inputs of the data's shape",
        )
    return found
