"""Batch norms whose statistics are taken again: only where held-out examples say that it helps."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lighten import batchnorms
from lighten.batchnorms import better_norms, reestimated
from lighten.coupling import couple
from lighten.network import Network
from lighten.prune import prune_network
from lighten.shrink import graph_module
from small_networks import Plain, Residual, images, trained

DATA = images(256)
TEST = images(128, seed=9)


def network(module: nn.Module | None = None) -> Network:
    return Network.of(module or trained(), DATA[:2])


def with_norms(module: nn.Module, factor: float, shift: float) -> nn.Module:
    """The module with statistics that are not those of its data."""
    found = copy.deepcopy(module)
    with torch.no_grad():
        for m in found.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_var *= factor
                m.running_mean += shift
    return found


def kld(found: Network, whole: Network, x: Tensor) -> float:
    p, q = whole(x).log_softmax(1), found(x).log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


# -- which one is kept ---------------------------------------------------------------------------
def test_wrong_statistics_are_taken_again() -> None:
    whole, small = network(), network(with_norms(trained(), 4.0, 0.3))
    found = better_norms(whole, small, DATA)
    assert found.again
    assert found.before is not None
    assert found.after is not None
    assert found.after < found.before
    assert kld(found.network, whole, TEST) < 0.2 * kld(small, whole, TEST)
    assert "re-estimated" in found.said


def test_right_statistics_stay() -> None:
    """Those of the whole network are exact; 192 other images can only come near to them."""
    whole = network()
    small = network(copy.deepcopy(trained()))
    found = better_norms(whole, small, DATA)
    assert not found.again
    assert found.network is small
    assert found.after is not None
    assert found.before == pytest.approx(0, abs=1e-9)
    assert found.after > found.before
    assert "as they were" in found.said


def test_the_decision_is_made_on_images_that_gave_no_statistics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []
    take = batchnorms.reestimated

    def spy(network: Network, data: Tensor, *, batch: int = 64) -> Network:
        seen.append(data)
        return take(network, data, batch=batch)

    monkeypatch.setattr(batchnorms, "reestimated", spy)
    judged: list[Tensor] = []
    whole = network()

    def dense(x: Tensor) -> Tensor:
        judged.append(x)
        return whole(x)

    for count, held in ((256, 64), (100, 32), (64, 32)):
        seen.clear()
        judged.clear()
        better_norms(dense, network(with_norms(trained(), 2, 0)), DATA[:count])
        rest, kept = torch.cat(seen), torch.cat(judged)
        assert (len(rest), len(kept)) == (count - held, held)
        rows = {x.sum().item() for x in rest} | {x.sum().item() for x in kept}
        assert len(rows) == count, "an image is on both sides"


def test_too_few_images_decide_nothing() -> None:
    small = network(with_norms(trained(), 4.0, 0.3))
    found = better_norms(network(), small, DATA[:63])
    assert found.network is small
    assert "63 images are too few" in found.said


def test_a_network_without_norms_is_left_alone_silently() -> None:
    plain = network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 5)))
    for data in (DATA, DATA[:40]):  # the second are too few for what is not there
        found = better_norms(plain, plain, data)
        assert found.network is plain
        assert found.said == ""


# -- the statistics ------------------------------------------------------------------------------
def test_statistics_are_the_mean_over_batches() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten()).eval()
    x = DATA[:96]
    found = reestimated(network(module), x, batch=48).module
    with torch.no_grad():
        y = [module[0](part) for part in (x[:48], x[48:])]
    state = found.state_dict()
    mean = torch.stack([part.mean((0, 2, 3)) for part in y]).mean(0)
    var = torch.stack([part.var((0, 2, 3)) for part in y]).mean(0)
    torch.testing.assert_close(state["1.running_mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["1.running_var"], var, rtol=1e-4, atol=1e-5)
    assert not found.training


class Kinds(nn.Module):
    """Norms over one, two and three dimensions, one as a function, one called twice; dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.BatchNorm2d(3)
        self.three = nn.BatchNorm3d(3)
        self.one = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(3 * 16 * 16, 5)
        self.register_buffer("m", torch.zeros(3))
        self.register_buffer("v", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.two(x))
        x = self.three(x.unsqueeze(2)).squeeze(2)
        x = F.batch_norm(x + 1, self.m, self.v)
        return self.one(self.head(self.drop(x).flatten(1)))


def test_every_kind_of_norm_is_reached_and_nothing_else() -> None:
    torch.manual_seed(0)
    small = network(Kinds())
    before = copy.deepcopy(small.module.state_dict())
    found = reestimated(small, DATA, batch=64)
    state = found.module.state_dict()
    moved = {k for k, t in state.items() if not torch.equal(t, before[k])}
    assert moved == {"m", "v", *(f"{n}.running_{s}" for n in ("one", "two", "three")
                                 for s in ("mean", "var"))}  # fmt: skip
    assert all(torch.equal(t, before[k]) for k, t in small.module.state_dict().items())
    assert torch.equal(reestimated(small, DATA).module.state_dict()["v"], state["v"]), "dropout?"
    out = found(DATA)
    torch.testing.assert_close(out.var(0), torch.ones(5), rtol=0.1, atol=0)


@pytest.mark.parametrize("kind", [Plain, Residual])
def test_an_exported_graph_has_the_same_statistics(kind: type[nn.Module]) -> None:
    whole = network(trained(kind))
    couplings = couple(whole)
    small = graph_module(whole, couplings, {})
    own, graph = reestimated(whole, DATA), reestimated(small, DATA)
    assert graph is not small
    torch.testing.assert_close(graph(TEST), own(TEST), rtol=1e-4, atol=1e-5)


def test_a_graph_of_one_batch_size_is_left_alone() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).view(2, -1)[:, :5]

    whole = network(Fixed())
    fixed = whole.with_module(fx.symbolic_trace(whole.module))
    found = better_norms(whole, fixed, DATA)
    assert found.network is fixed
    assert "one size of batch" in found.said


# -- in prune ------------------------------------------------------------------------------------
def test_without_compensation_it_mends_a_pruned_network() -> None:
    whole = network(trained(Plain))
    pruned = {
        norms: prune_network(
            whole, DATA, budget="0.5 macs", criterion="l1", compensate=False, batch_norms=norms
        )
        for norms in (False, True)
    }
    assert kld(pruned[True].network, whole, TEST) < 0.8 * kld(pruned[False].network, whole, TEST)
    assert any("re-estimated" in note for note in pruned[True].network.notes)
    assert not any("batch norms" in note for note in pruned[False].network.notes)


def test_after_compensation_it_is_kept_only_where_it_helps() -> None:
    whole = network()
    found = prune_network(whole, DATA, budget="0.6 macs")
    plain = prune_network(whole, DATA, budget="0.6 macs", batch_norms=False)
    held = DATA[torch.arange(256) % 4 == 0]
    assert kld(found.network, whole, held) <= kld(plain.network, whole, held) + 1e-6
