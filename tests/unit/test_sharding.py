"""A student in shares: what it learns is what one process learns; it comes back as it was."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lighten.devices import start_fabric
from lighten.errors import WrongUse
from lighten.sharding import (
    Shards,
    blocks,
    check_optimizer,
    clip,
    fill,
    gathered,
    is_share,
    share_of,
    spread,
)

pytest.importorskip("lightning", reason="learning needs lightning")
pytestmark = pytest.mark.usefixtures("one_thread")


class Deep(nn.Module):
    """Blocks in a list, one tied to the entrance, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())])
        self.layers.append(nn.Linear(4, 4))
        self.layers[2].weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x * self.scale


class Beside(nn.Module):
    """Its parameter belongs to a module that it keeps beside its module tree."""

    def __init__(self) -> None:
        super().__init__()
        self._held = (nn.Linear(4, 4),)
        self.weight = self._held[0].weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self._held[0](x)
        return found


@pytest.fixture
def alone() -> Iterator[Any]:
    """A group of one process, and its mesh."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.HashStore(),  # type: ignore[attr-defined]
        rank=0,
        world_size=1,
    )
    yield init_device_mesh("cpu", (1, 1))
    torch.distributed.destroy_process_group()


def in_shares(module: nn.Module, mesh: Any) -> Shards:
    shards = Shards(module)
    spread(module, mesh)
    shards.began()
    return shards


def test_blocks_are_what_lists_hold_and_no_other_uses() -> None:
    deep = Deep()
    assert blocks(deep) == [deep.layers[0], deep.layers[1][0]]  # type: ignore[index]
    assert blocks(nn.Linear(2, 2)) == []


def test_a_module_in_shares_is_shown_as_it_was_and_comes_back(alone: Any) -> None:
    deep, x = Deep(), torch.randn(5, 4)
    wanted, before, kinds = deep(x), copy.deepcopy(deep.state_dict()), [*map(type, deep.modules())]
    parameters = list(deep.parameters())
    shards = in_shares(deep, alone)
    assert all(is_share(p) == (p.ndim > 0) for p in deep.parameters())
    assert sum(p.numel() for p in parameters) == 1  # the scalar stays
    assert type(deep) is not Deep
    assert torch.allclose(deep(x), wanted)
    with shards.whole():
        assert [*map(type, deep.modules())] == kinds
        assert torch.allclose(copy.deepcopy(deep)(x), wanted)
    assert torch.allclose(deep(x), wanted)
    with shards.whole(write=True), torch.no_grad():
        deep.layers[0].bias.add_(1)  # type: ignore[operator, union-attr]
    assert torch.allclose(gathered(deep.layers[0].bias), before["layers.0.bias"] + 1)  # type: ignore[arg-type]
    fill(deep, before)
    assert torch.allclose(deep(x), wanted)
    shards.end()
    assert all(a is b for a, b in zip(parameters, deep.parameters(), strict=True))
    assert [*map(type, deep.modules())] == kinds
    assert not any(value for m in deep.modules() for key, value in vars(m).items() if "hook" in key)
    deep.load_state_dict(before)
    assert deep.layers[2].weight is deep.first.weight
    assert torch.equal(copy.deepcopy(deep)(x), wanted)


def test_gradients_in_shares_and_whole_ones_are_clipped_together(alone: Any) -> None:
    deep, x = Deep(), torch.randn(5, 4)
    twin = copy.deepcopy(deep)
    in_shares(deep, alone)
    for module in (deep, twin):
        module(x).square().sum().backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    clip(deep.parameters(), 0.1)
    for p, q in zip(deep.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.allclose(gathered(p.grad), q.grad, atol=1e-6)


def test_a_penalty_on_the_whole_weights_reaches_the_shares(alone: Any) -> None:
    deep, x = Deep(), torch.randn(5, 4)
    weight = deep.first.weight
    shards = in_shares(deep, alone)
    deep(x).sum().backward()
    now = deep.first.weight.grad
    assert now is not None
    before = gathered(now).clone()
    whole = gathered(deep.first.weight)
    assert shards.charge(lambda: weight.square().sum()) == pytest.approx(
        float(whole.square().sum())
    )
    found = deep.first.weight.grad
    assert found is not None
    assert torch.allclose(gathered(found), before + 2 * whole, atol=1e-5)


def test_what_cannot_be_done_in_shares_is_told(alone: Any) -> None:
    deep = Deep()
    shards = in_shares(deep, alone)
    with pytest.raises(WrongUse, match=r"another parameter in the place of Linear\.bias"):  # noqa: SIM117
        with shards.whole(write=True):
            deep.first.bias = nn.Parameter(torch.zeros(4))
    assert is_share(deep.first.bias)

    class Reaching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.layers[0].weight)  # type: ignore[arg-type]

    reaching = Reaching()
    shards = in_shares(reaching, alone)
    with pytest.raises(WrongUse, match="cannot be learned in shares") as error, shards.trial():
        reaching(torch.ones(2, 4))
    assert "ddp" in error.value.hint
    held = Beside()
    shards = in_shares(held, alone)
    with pytest.raises(WrongUse, match=r"cannot be learned in shares|outside"), shards.trial():
        held(torch.ones(2, 4)).sum().backward()
    with pytest.raises(WrongUse, match="`muon` looks at whole weights"):
        check_optimizer("muon")
    mixed = nn.Linear(4, 4)
    mixed.weight = nn.Parameter(torch.ones(4, 4).T.contiguous().T)
    with pytest.raises(WrongUse, match="cannot be spread"):
        spread(mixed, alone)


def test_a_share_of_a_whole_tensor_is_all_of_it() -> None:
    assert torch.equal(share_of(torch.ones(3), torch.zeros(3)), torch.ones(3))


@pytest.mark.parametrize(
    ("strategy", "accelerator", "text"),
    [
        ("deepspeed", "cpu", "`deepspeed` spreads the student's weights in a way"),
        ("fsdp_cpu_offload", "cpu", "`fsdp_cpu_offload` spreads"),
        ("fsdp", "mps", "does not run on mps"),
    ],
)
def test_other_ways_to_spread_are_refused(strategy: str, accelerator: str, text: str) -> None:
    with pytest.raises(WrongUse, match=text):
        start_fabric("32-true", accelerator, 2, strategy)


# -- two processes ---------------------------------------------------------------------------------
PROGRAM = Path(__file__).parent / "learning_in_two.py"
CASES = ("plain", "all", "parametrized", "given", "breaks")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder / processes / strategy:case, of all cases; each program runs once."""
    home = tmp_path_factory.mktemp("shares")
    in_two = [
        "fsdp:stopped",
        *(f"fsdp:{case}" for case in CASES),
        "fsdp:norms",
        "fsdp:graph",
        "ddp:plain",
    ]
    for devices, cases in (("1", [f"auto:{case}" for case in (*CASES, "graph")]), ("2", in_two)):
        done = subprocess.run(
            [sys.executable, str(PROGRAM), str(home / devices), devices, *cases],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            timeout=800,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
    return home


def facts(folder: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"facts-{rank}.json").read_text())
    return found


def state(folder: Path, rank: int = 0) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / f"student-{rank}.safetensors")
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)  # of a busy machine: the first of them runs all cases
@pytest.mark.parametrize("case", [f"fsdp:{each}" for each in (*CASES[:4], "graph")] + ["ddp:plain"])
def test_two_processes_learn_what_one_learns(ran: Path, case: str) -> None:
    """Each takes half of every batch. `all`: hooks, a penalty, a moving average, clipped gradients,
    parts of a batch, AdamW, and a stop after the sixth step, after which the same call goes on."""
    one, two = ran / "1" / case.replace(case.partition(":")[0], "auto"), ran / "2" / case
    wanted, found = facts(one), facts(two)
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-3)
    assert found["first"] == pytest.approx(wanted["first"], rel=1e-5)
    assert found["best"] == pytest.approx(wanted["best"], rel=1e-3)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-3)
    assert (found["steps"], found["best_step"]) == (wanted["steps"], wanted["best_step"])
    for name, value in state(one).items():
        assert torch.equal(state(two)[name], state(two, 1)[name])
        scale = 1 + float(value.abs().max())
        assert torch.allclose(value, state(two)[name], atol=1e-4 * scale), name


@pytest.mark.slow
def test_each_of_two_processes_has_half_of_every_weight(ran: Path) -> None:
    held = facts(ran / "2" / "fsdp:all")["held"], facts(ran / "2" / "fsdp:all", 1)["held"]
    assert held[0]["student.0.weight"] == held[1]["student.0.weight"] == 4 * 9 // 2
    assert held[0]["student.6.weight"] + held[1]["student.6.weight"] == 3 * 16


@pytest.mark.slow
def test_a_stopped_training_in_shares_went_on(ran: Path) -> None:
    said = facts(ran / "2" / "fsdp:stopped")["said"]
    assert said == "Stop: at 6"
    assert len(facts(ran / "2" / "fsdp:all")["norms"]) == 12
    assert facts(ran / "2" / "fsdp:all")["began"] == 5


@pytest.mark.slow
def test_a_broken_loss_stops_both_processes(ran: Path) -> None:
    one, two = (facts(ran / place) for place in ("1/auto:breaks", "2/fsdp:breaks"))
    assert "broke down at step" in two["said"]
    assert two["said"].splitlines()[0].split(":")[1] == one["said"].splitlines()[0].split(":")[1]
    for name, value in state(ran / "1/auto:breaks").items():
        for rank in (0, 1):
            assert torch.allclose(value, state(ran / "2/fsdp:breaks", rank)[name], atol=1e-5)


@pytest.mark.slow
def test_running_statistics_are_the_same_in_both(ran: Path) -> None:
    first, second = state(ran / "2/fsdp:norms"), state(ran / "2/fsdp:norms", 1)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
def test_students_come_back_plain_from_two_processes(ran: Path) -> None:
    assert list((ran / "2" / "ddp:plain" / "states").glob("step-12*"))
    for folder in (ran / "2").iterdir():
        for rank in (0, 1):
            found = facts(folder, rank)
            assert found["same_kinds"], folder.name
            assert found["same_parameters"], folder.name
            assert found["hooks"] == 0, folder.name
            assert found["attributes"] == [], folder.name
