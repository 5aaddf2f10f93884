"""What widths and formats cost together: bytes near those of real files, times with conversions."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lighten.coupling import couple
from lighten.format_errors import FormatErrors
from lighten.latency_operators import Operator
from lighten.mixed_cost import KEEP, Scale, byte_terms, decisions_of, format_of, time_terms
from lighten.mixture import Touch, quantize_mixed
from lighten.network import Network
from lighten.registry import exporters
from lighten.shrink import shrink
from lighten.types import Spec
from small_networks import images, trained

X = images(16)
NET = Network.of(trained(), X[:2])
AXES = couple(NET).free
NAMES = ["stem.weight", "conv1.weight", "conv2.weight", "head.weight"]
INT8, INT4 = "int8_channel_sym@gptq", "int4_channel_sym@gptq"
BITS = {key: {KEEP: 32.0, INT8: 8.0, INT4: 4.0} for key in NAMES}


def values(*options: str, **widths: int) -> dict[str, Any]:
    found: dict[str, Any] = {a.name: a.width for a in AXES}
    found |= {f"{name}.weight": width for name, width in widths.items()}
    return found | {format_of(n): o for n, o in zip(NAMES, options, strict=True)}


@pytest.mark.parametrize(
    "options",
    [(INT8,) * 4, (INT4,) * 4, (KEEP, INT4, INT8, KEEP), (INT4, KEEP, KEEP, INT8)],
)
@pytest.mark.parametrize("width", [16, 8])
def test_bytes_differ_as_those_of_checkpoints(
    tmp_path: Path, options: tuple[str, ...], width: int
) -> None:
    """The same networks in two mixes: what a file has beside its weights falls out."""
    import torch

    couplings = couple(NET)
    small = NET
    if width < 16:
        small = shrink(NET, couplings, {"conv1.weight": torch.arange(width)})
    predicted = byte_terms(NET, AXES, BITS)
    sizes, sums = [], []
    for each in (options, (INT8, INT4, INT8, INT4)):
        specs = {n: Spec.parse(o) for n, o in zip(NAMES, each, strict=True)}
        made = quantize_mixed(small, X, specs, quick=True)
        sizes.append(exporters["checkpoint"].nbytes(made))
        sums.append(predicted(values(*each, conv1=width)))
    assert sums[0] - sums[1] == pytest.approx(sizes[0] - sizes[1], abs=500)


def test_an_integer_layer_adds_what_it_is_said_to() -> None:
    plain, more = byte_terms(NET, AXES, BITS), byte_terms(NET, AXES, BITS, overhead=100.0)
    mix = values(KEEP, INT8, INT4, KEEP)
    assert more(mix) - plain(mix) == pytest.approx(200)


class Table:
    """Float operators take 3 times as long as integers; a stream what it reads and writes."""

    def __init__(self, integer: bool) -> None:
        self.factor = 1.0 if integer else 3.0

    def measure(self, operators: Any) -> None:
        pass

    def milliseconds(self, operator: Operator) -> float:
        if operator.kind == "stream":
            return self.factor * (1e-4 + 1e-7 * operator.elements)
        size = operator.inputs * operator.outputs * math.prod(operator.kernel)
        return self.factor * 1e-5 * size


def test_times_of_operators_and_of_conversions() -> None:
    predicted = time_terms(NET, AXES, NAMES, Table).predicted(Scale())  # type: ignore[arg-type]
    floats, integers = predicted(values(*[KEEP] * 4)), predicted(values(*[INT8] * 4))
    assert floats == pytest.approx(3 * integers)
    assert predicted(values(*[INT4] * 4)) == integers, "4 bits are multiplied as 8"
    one = predicted(values(INT8, KEEP, INT8, INT8))
    own = 2 * 1e-5 * 16 * 16 * 9
    assert one > integers + own, "a float layer among integers needs conversions"
    assert one < floats
    narrow = predicted(values(*[INT8] * 4, conv1=8))
    assert narrow < integers


def test_three_real_files_say_what_operators_are_off_by() -> None:
    """Layouts that change between float and integers are in no single operator's time."""
    times = time_terms(NET, AXES, NAMES, Table)  # type: ignore[arg-type]
    truth = times.predicted(Scale(1.2, 0.8, 30.0))
    mixes = [values(*[INT8] * 4), values(*[KEEP] * 4), values(INT8, KEEP, INT8, KEEP)]
    found = times.fitted(*((mix, truth(mix)) for mix in mixes))
    assert found.floats == pytest.approx(1.2)
    assert found.integers == pytest.approx(0.8)
    assert found.conversions == pytest.approx(30)
    other = values(KEEP, INT4, KEEP, INT8, conv1=8)
    assert times.predicted(found)(other) == pytest.approx(truth(other))


def test_errors_of_layers_and_of_what_they_share() -> None:
    weights = {name: {"int8_channel_sym": 0.25, "int4_channel_sym": 1.0} for name in NAMES[:2]}
    errors = FormatErrors(weights, [(Touch(frozenset(NAMES[:2])), 0.5)])
    decisions, losses = decisions_of(errors, [KEEP, INT8, INT4])
    assert [d.errors for d in decisions] == [(0.0, 0.25, 1.0)] * 2
    [shared] = losses
    assert shared.names == tuple(sorted(format_of(n) for n in NAMES[:2]))
    assert shared.cost(values(KEEP, KEEP, INT8, INT8)) == 0
    assert shared.cost(values(KEEP, INT4, KEEP, KEEP)) == 0.5
