"""What compress() of networks is given: data of any kind, a judge, a module it leaves alone."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compressed_networks import X, Y, compress, held_out
from lighten import errors
from lighten.pipeline import Result
from lighten.samples import samples
from small_networks import images, labels, trained

pytestmark = pytest.mark.usefixtures("steady")


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
