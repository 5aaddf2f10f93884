"""compress() of networks from end to end: budgets, exports, resuming, refusals.

What the runtime takes is made up from the file, so that nothing here depends on how busy the
machine is; one test asks the real one.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from lighten import batchnorms, errors, front, job, network_cost, network_structure
from lighten.latency_operators import Operator
from lighten.macs import macs
from lighten.network import Network
from lighten.pipeline import Result
from lighten.registry import exporters
from lighten.run import Run
from lighten.runtimes import onnxruntime
from lighten.samples import samples
from small_networks import CLASSES, SIDE, Residual, images, labels, trained

X = images(96)
Y = labels(trained(), X)
EXAMPLE = X[:2]


def made_up(path: Path, **_: Any) -> onnxruntime.Latency:
    """Milliseconds in proportion to the weights in a file, whatever their type."""
    import onnx

    tensors = onnx.load(path).graph.initializer
    size = sum(math.prod(t.dims) for t in tensors if len(t.dims) > 1)
    return onnxruntime.Latency(0.1 + size / 1e4, 0.2 + size / 1e4, 0.3 + size / 1e4, 9, 10**8)


def in_turns(files: Mapping[str, Path], **_: Any) -> dict[str, onnxruntime.Latency]:
    return {name: made_up(path) for name, path in files.items()}


class Table:
    """Times of operators that have little to do with those of files."""

    def __init__(self, path: Path, threads: int, int8: bool) -> None:
        pass

    def measure(self, operators: Iterable[Operator]) -> None:
        pass

    def milliseconds(self, operator: Operator) -> float:
        o = operator
        return 1e-5 * (o.inputs + o.outputs + 3) * math.prod(o.kernel)


@pytest.fixture(autouse=True)
def _steady(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "latency", made_up)
    monkeypatch.setattr(onnxruntime, "latencies", in_turns)
    monkeypatch.setattr(network_cost, "LatencyTable", Table)


def compress(out: Path, module: nn.Module | None = None, **options: Any) -> Result:
    options.setdefault("data", (X, Y))
    return front.compress(module or trained(), EXAMPLE, out=out, **options)


def size(path: Path) -> int:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(p.stat().st_size for p in files)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Result]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "latency", made_up)
        patch.setattr(onnxruntime, "latencies", in_turns)
        yield compress(tmp_path_factory.mktemp("done") / "run", budget="0.5 macs")


def held_out() -> Tensor:
    return samples((X, Y)).held_out


# -- budgets -------------------------------------------------------------------------------------
def test_half_of_the_multiply_adds(done: Result) -> None:
    small = Network.of(done.module, EXAMPLE)
    before, after = done.metrics["before"], done.metrics["after"]
    assert macs(small).total == after["macs"] <= 0.5 * before["macs"]
    assert before["macs"] == macs(Network.of(trained(), EXAMPLE)).total
    assert size(done.exported) == after["bytes"] < before["bytes"]
    assert isinstance(done.module, Residual)
    x = held_out()
    [found] = onnxruntime.run(done.exported, x)
    with torch.no_grad():
        torch.testing.assert_close(found, done.module(x), rtol=1e-4, atol=1e-5)
    [single] = onnxruntime.run(done.exported, x[:1])
    torch.testing.assert_close(single, found[:1], rtol=1e-4, atol=1e-5)


def test_the_facts_of_a_run(done: Result) -> None:
    stored = json.loads((done.run / "metrics.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(done.metrics))
    assert {"before", "after", "plans", "notes", "problems", "widths"} <= set(stored)
    assert stored["problems"] == []
    plans = {row["plan"]: row for row in stored["plans"]}
    assert {"allocated", "uniform"} <= set(plans)
    best = min(plans, key=lambda name: plans[name]["mean_kld"]["value"])
    assert [name for name, row in plans.items() if row["chosen"]] == [best] == [stored["plan"]]
    assert plans[best]["mean_kld"]["value"] == pytest.approx(stored["after"]["mean_kld"]["value"])
    assert stored["examples"] == len(held_out())
    assert stored["calibrated_on"] == len(samples((X, Y)).calibration)
    for row in (stored["before"], stored["after"]):
        assert 0 <= row["accuracy"]["low"] <= row["accuracy"]["value"] <= 1
        assert row["p50_ms"] > 0
    plan = json.loads((done.run / "plan.json").read_text(encoding="utf-8"))
    assert plan["widths"] == {w["axis"]: w["units"] for w in stored["widths"]}


def test_half_of_the_parameters(tmp_path: Path) -> None:
    found = compress(tmp_path / "run", budget="0.5 params", data=X)
    whole = sum(p.numel() for p in trained().parameters())
    assert sum(p.numel() for p in found.module.parameters()) <= 0.5 * whole
    assert "accuracy" not in found.metrics["after"], "there are no labels"
    assert found.metrics["after"]["top1_agreement"]["value"] <= 1
    assert not found.metrics["problems"]


@pytest.mark.parametrize("quantize", ["auto", "none"])
def test_a_size_of_the_file(tmp_path: Path, quantize: str) -> None:
    whole = tmp_path / "whole.onnx"
    exporters["onnx"].write(Network.of(trained(), EXAMPLE), whole)
    room = int({"auto": 0.55, "none": 0.7}[quantize] * size(whole))
    found = compress(tmp_path / "run", budget=f"{room / 1000}kB", quantize=quantize)
    assert size(found.exported) <= room
    assert found.metrics["after"]["bytes"] == size(found.exported)
    assert not found.metrics["problems"]


def test_a_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compress(tmp_path / "run", budget="70% ms", data=X)
    before, after = found.metrics["before"]["p50_ms"], found.metrics["after"]["p50_ms"]
    assert after == made_up(found.exported).p50 <= 0.7 * before
    assert all(row["units"] % 8 == 0 for row in found.metrics["widths"])
    assert not found.metrics["problems"]
    idle(monkeypatch)  # a time that is taken again could be on the other side of the budget
    assert compress(tmp_path / "run", budget="70% ms", data=X).metrics == found.metrics


def test_a_budget_that_is_missed_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last word has the file that was written, not those on the way to it."""
    speeds = network_cost.speeds

    def slower(export: str, files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
        found = speeds(export, files)
        for name, path in files.items():
            found[name]["p50_ms"] += 200 * ("exports" in str(path))
        return found

    monkeypatch.setattr(network_cost, "speeds", slower)
    found = compress(tmp_path / "run", budget="100ms", data=X)
    assert "budget is not met" in " ".join(found.metrics["problems"])


@pytest.mark.parametrize("quantize", ["auto", "int8", "none"])
def test_a_share_is_of_the_same_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str
) -> None:
    """The machine was busy when the original was measured: that makes no share easier to meet."""
    load = iter([5.0])

    def busy(files: Mapping[str, Path], **_: Any) -> dict[str, onnxruntime.Latency]:
        share = next(load, 1.0)
        return {
            name: onnxruntime.Latency(share * made_up(path).p50, 99, 99, 9, 10**8)
            for name, path in files.items()
        }

    monkeypatch.setattr(onnxruntime, "latencies", busy)
    found = compress(tmp_path / "run", budget="70% ms", data=X, quantize=quantize)
    [original] = (found.run / "original").glob("*.onnx")
    assert made_up(found.exported).p50 <= 0.7 * made_up(original).p50
    assert found.metrics["before"]["p50_ms"] == made_up(original).p50
    assert not found.metrics["problems"]


def test_the_real_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(network_cost, "SECONDS", 0.05)
    monkeypatch.setattr(network_cost, "SECONDS_A_TRY", 0.05)
    found = compress(tmp_path / "run", budget="10000ms", data=X)
    after = found.metrics["after"]
    assert 0 < after["p50_ms"] <= after["p90_ms"] <= after["p99_ms"]
    assert after["peak_memory_bytes"] > 10**6
    assert found.metrics["plans"] == []


# -- integers ------------------------------------------------------------------------------------
@pytest.mark.parametrize("quantize", [None, "int8", "w4a8", "w4a4"])
def test_integers_without_a_budget(tmp_path: Path, quantize: str | None) -> None:
    found = compress(tmp_path / "run", quantize=quantize)
    kinds = onnxruntime.operators(found.exported)
    if quantize in (None, "int8"):
        assert kinds.get("QLinearConv", 0) == 3
    before, after = found.metrics["before"], found.metrics["after"]
    assert before["macs"] == after["macs"]
    assert after["bytes"] < before["bytes"]
    assert found.metrics["widths"] == found.metrics["plans"] == []
    # the quality that is told is that of the file in its runtime
    x = held_out()
    [codes] = onnxruntime.run(found.exported, x)
    with torch.no_grad():
        same = (codes.argmax(1) == trained()(x).argmax(1)).float().mean()
    told = found.metrics["after"]["top1_agreement"]["value"]
    assert abs(float(same) - told) <= 2 / len(x)
    assert told > 0.9


def test_nothing_to_do_is_told(tmp_path: Path) -> None:
    with pytest.raises(errors.WrongUse, match="nothing to do"):
        compress(tmp_path / "run", quantize="none")
    assert not (tmp_path / "run").exists()


def test_structure_and_integers(tmp_path: Path) -> None:
    found = compress(tmp_path / "run", budget="0.6 macs", quantize="int8")
    assert found.metrics["after"]["macs"] <= 0.6 * found.metrics["before"]["macs"]
    assert "QLinearConv" in onnxruntime.operators(found.exported)


def test_a_checkpoint(tmp_path: Path) -> None:
    found = compress(tmp_path / "run", budget="0.5 macs", export="checkpoint")
    assert found.exported.is_dir()
    assert found.metrics["after"]["bytes"] == size(found.exported)
    read = exporters["checkpoint"].read(found.exported)
    own = found.module.state_dict()
    assert set(read) == set(own)
    assert all(torch.equal(read[k], t) for k, t in own.items())
    assert "p50_ms" not in found.metrics["after"]
    bytes_too = compress(tmp_path / "two", budget="60%", export="checkpoint", quantize="none")
    assert size(bytes_too.exported) <= 0.6 * bytes_too.metrics["before"]["bytes"]
    with pytest.raises(errors.WrongUse, match="no runtime"):
        compress(tmp_path / "three", budget="50% ms", export="checkpoint")


# -- what is passed in ---------------------------------------------------------------------------
def test_data_of_any_kind_is_the_same(done: Result, tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=16)
    again = compress(done.run, budget="0.5 macs", data=loader)  # the digest is that of the values
    assert again.metrics == done.metrics
    found = samples(list(loader))
    assert torch.equal(found.held_out, held_out())


def test_a_function_of_the_users_own_decides(tmp_path: Path) -> None:
    asked: list[Any] = []

    def evaluate(network: Callable[[Tensor], Tensor]) -> float:
        """Turns the usual order round: the plan that is farther from the original wins."""
        with torch.no_grad():
            wanted, found = trained()(X), network(X)
        asked.append(network)
        return float((found - wanted).square().mean())

    found = compress(tmp_path / "run", budget="0.5 macs", evaluate=evaluate)
    plans = {row["plan"]: row for row in found.metrics["plans"]}
    made = {file.read_text() for file in (tmp_path / "run" / "widths").glob("*.json")}
    assert len(asked) == 2 + len(made)  # the original, all widths once, the result
    chosen = found.metrics["plan"]
    assert plans[chosen]["evaluate"] == max(row["evaluate"] for row in plans.values())
    assert found.metrics["before"]["evaluate"] == 0
    assert found.metrics["after"]["evaluate"] == pytest.approx(plans[chosen]["evaluate"])
    with pytest.raises(errors.ChangedRequest, match="another request"):
        compress(tmp_path / "run", budget="0.5 macs")


def test_other_data_to_measure_on(tmp_path: Path) -> None:
    other = images(20, seed=7)
    found = compress(
        tmp_path / "run", data=X, test=(other, labels(trained(), other)), quantize="int8"
    )
    assert found.metrics["examples"] == 20
    assert found.metrics["calibrated_on"] == 96
    assert found.metrics["before"]["accuracy"]["value"] == pytest.approx(0.75)


def test_the_users_module_is_not_touched(tmp_path: Path) -> None:
    module = trained().train()
    module.stem.weight.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    flags = {n: p.requires_grad for n, p in module.named_parameters()}
    modes = [m.training for m in module.modules()]
    compress(tmp_path / "run", module, budget="0.5 macs", export="checkpoint")
    assert all(torch.equal(t, before[k]) for k, t in module.state_dict().items())
    assert {n: p.requires_grad for n, p in module.named_parameters()} == flags
    assert [m.training for m in module.modules()] == modes
    assert all(p.grad is None for p in module.parameters())


# -- resuming ------------------------------------------------------------------------------------
def _work(*_: Any, **__: Any) -> Any:
    raise AssertionError("a finished run does no work")


def idle(patch: pytest.MonkeyPatch) -> None:
    for name in ("curves", "compensate", "narrow"):
        patch.setattr(network_structure, name, _work)
    for name in ("quantize_network", "outputs"):
        patch.setattr(job, name, _work)
    patch.setattr(network_cost, "speeds", _work)
    patch.setattr(network_cost, "_p50", _work)


def test_the_same_call_again_does_nothing(done: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    before = done.exported.read_bytes()
    idle(monkeypatch)
    again = compress(done.run, budget=" 0.5  macs")
    assert again.metrics == done.metrics
    assert again.exported == done.exported
    assert again.exported.read_bytes() == before
    for mine, theirs in zip(
        again.module.state_dict().values(), done.module.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "change",
    [
        {"budget": "0.6 macs"},
        {"quantize": "int8"},
        {"multiple": 4},
        {"export": "checkpoint"},
        {"data": X},
        {"module": trained(seed=3)},
    ],
)
def test_another_request_is_refused(done: Result, change: dict[str, Any]) -> None:
    with pytest.raises(errors.ChangedRequest, match="another request") as caught:
        compress(done.run, **{"budget": "0.5 macs", **change})
    assert next(iter(change)).replace("module", "model") in caught.value.hint


class Killer:
    """Ends the process, as it were, the first time that each result is about to be recorded."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.killed: list[str] = []
        record = Run._record

        def once(run: Run, line: dict[str, Any]) -> None:
            key = str(line.get("key"))
            if key not in self.killed:
                self.killed.append(key)
                raise KeyboardInterrupt
            record(run, line)

        patch.setattr(Run, "_record", once)


def test_killed_and_resumed_it_makes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"budget": "0.5 macs", "quantize": "int8", "export": "checkpoint"}
    whole = compress(tmp_path / "a" / "run", **options)
    killer = Killer(monkeypatch)
    found = None
    for _ in range(40):
        try:
            found = compress(tmp_path / "b" / "run", **options)
            break
        except KeyboardInterrupt:
            continue
    assert found is not None
    assert {"measured/original.json", "metrics.json", "curves.safetensors"} <= set(killer.killed)
    assert len(killer.killed) >= 11
    names = [
        {p.relative_to(r.run) for p in r.run.rglob("*") if p.is_file()} for r in (whole, found)
    ]
    assert names[0] == names[1]
    timed = {Path(n) for n in ("manifest.jsonl", ".lock", "report.html", "stages.jsonl")}
    timed |= {Path("look/provenance.json")}
    for name in names[0] - timed:
        assert (whole.run / name).read_bytes() == (found.run / name).read_bytes(), name


def test_what_was_removed_or_changed_is_made_again(done: Result, tmp_path: Path) -> None:
    before = done.exported.read_bytes()
    for path in (done.exported, *(done.run / "shrunk").glob("*.safetensors")):
        path.write_bytes(path.read_bytes()[:-1])
    (done.run / "metrics.json").unlink()
    again = compress(done.run, budget="0.5 macs")
    assert again.exported.read_bytes() == before
    assert again.metrics == done.metrics


def test_two_ways_to_the_same_widths_are_one_piece_of_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    solve = network_structure.compensate

    def spy(*arguments: Any, **options: Any) -> Network:
        done.append(arguments)
        return solve(*arguments, **options)

    monkeypatch.setattr(network_structure, "compensate", spy)
    monkeypatch.setattr(network_structure, "uniform", network_structure.spend)
    found = compress(tmp_path / "run", budget="0.5 macs", export="checkpoint")
    widths = {p.stem: p.read_text() for p in (tmp_path / "run" / "widths").glob("*.json")}
    rows = {row["plan"]: row for row in found.metrics["plans"]}
    assert len(rows) == len(widths) > len(set(widths.values())) == len(done)
    for one in rows:
        for two in rows:
            same = rows[one]["mean_kld"] == rows[two]["mean_kld"]
            assert same == (widths[one] == widths[two])


def test_batch_norms_are_as_a_held_out_part_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """96 images to calibrate on: enough to decide. Once the decision is turned round, the result
    is the other one, and what is told follows."""

    def told(name: str) -> tuple[Result, str]:
        other = images(40, seed=7)
        found = compress(tmp_path / name, data=X, test=other, budget="0.5 macs",
                         export="checkpoint")  # fmt: skip
        [line] = [note for note in found.metrics["notes"] if "batch norms" in note]
        return found, line

    first, line = told("first")
    again = "are re-estimated" in line
    assert again or "are as they were" in line
    monkeypatch.setattr(batchnorms, "_distance", lambda *_: next(turn))
    turn = iter([1.0, 2.0] * 3 if again else [2.0, 1.0] * 3)
    second, line = told("second")
    assert ("are re-estimated" in line) is not again
    a, b = (r.module.state_dict() for r in (first, second))
    assert not torch.equal(a["bn1.running_var"], b["bn1.running_var"])
    monkeypatch.undo()
    assert told("second")[1] == line, "told from the stored decision"


# -- mistakes ------------------------------------------------------------------------------------
class Odd(nn.Module):
    """Its weights are of a type that ONNX is not written in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.register_buffer("shift", torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) + self.shift.float()).mean((2, 3))


def _with_nan() -> nn.Module:
    module = trained()
    with torch.no_grad():
        module.conv1.weight[0, 0, 0, 0] = float("nan")
    return module


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"data": (X, Y + 1)}, errors.BadInput, f"to {CLASSES}, the network has {CLASSES}"),
        ({"data": (X, Y - CLASSES)}, errors.BadInput, "to -1, the network has"),
        ({"data": (X, Y[:9])}, errors.BadInput, "96 inputs and 9 labels"),
        ({"data": X.clone().fill_(math.nan)}, errors.BadInput, "NaN"),
        ({"data": X[:, :, :8, :8]}, errors.WrongUse, f"(3, 8, 8) and the network takes (3, {SIDE}"),
        ({"data": X[:1]}, errors.BadInput, "two are needed"),
        ({"data": 3}, errors.WrongUse, "int is no data"),
        ({"data": None}, errors.WrongUse, "needs data"),
        ({"data": "nowhere.npz"}, errors.UserError, "nowhere.npz"),
        ({"module": _with_nan()}, errors.BadInput, "`conv1.weight`"),
        ({"module": Odd()}, errors.WrongUse, "float64"),
        ({"quantize": "int9"}, errors.WrongUse, "int9"),
        ({"export": "onxx"}, errors.UnknownName, "did you mean `onnx`"),
        ({"export": "gguf"}, errors.WrongUse, "checkpoint, onnx"),
        ({"budget": "4.5bpw"}, errors.WrongUse, "bits per weight"),
        ({"budget": "many"}, errors.WrongUse, "many"),
        ({"budget": "0.001 macs"}, errors.ImpossibleBudget, "macs"),
        ({"max_kld": 0.1}, errors.WrongUse, "language models"),
        ({"samples": 0}, errors.WrongUse, "0 examples"),
        ({"multiple": 0}, errors.WrongUse, "multiple"),
    ],
)
def test_mistakes_are_told(
    options: dict[str, Any], kind: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        compress(tmp_path / "run", **{"budget": "0.5 macs", **options})
    assert said in str(caught.value)
    assert caught.value.hint or "data" in options  # type: ignore[attr-defined]


def test_an_impossible_size_says_the_smallest(tmp_path: Path) -> None:
    with pytest.raises(errors.ImpossibleBudget) as caught:
        compress(tmp_path / "run", budget="1kB", quantize="none", export="checkpoint")
    assert "budget in bytes" in caught.value.message
    least = float(caught.value.message.rpartition(" ")[2].replace(",", ""))
    room = 1.05 * least
    found = compress(
        tmp_path / "again", budget=f"{room / 1000}kB", quantize="none", export="checkpoint"
    )
    assert size(found.exported) <= room


@pytest.mark.parametrize(
    "option",
    [
        {"example_inputs": EXAMPLE}, {"evaluate": len}, {"quantize": "int8"}, {"weights": "w.pt"},
        {"size": 32}, {"mean": "imagenet"}, {"std": "imagenet"}, {"test": X}, {"multiple": 8},
        {"crop": "squash"}, {"sparsity": "0.5"},
    ],
)  # fmt: skip
def test_options_of_networks_are_refused_for_language_models(
    option: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(errors.WrongUse, match="is for networks"):
        front.compress(str(tmp_path), budget="80MB", **option)


def test_a_module_without_examples(tmp_path: Path) -> None:
    with pytest.raises(errors.WrongUse, match="example inputs"):
        front.compress(trained(), data=X, budget="0.5 macs")
