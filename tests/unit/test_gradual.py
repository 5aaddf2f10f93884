"""Sparse weights during training: exact counts, regrowth, momentum, checkpoints, accuracy."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lighten.errors import BadInput, UnknownName, WrongUse
from lighten.gradual import GradualPruning
from lighten.rewind import Rewind
from lighten.schedules import SHAPES
from lighten.types import Stats
from lighten.weight_masks import WeightMasks, weights_of


def net(seed: int = 0, inputs: int = 16, hidden: int = 24, classes: int = 4) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def sgd(module: nn.Module, momentum: float = 0.9) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=momentum, weight_decay=1e-3)


def batch(n: int, inputs: int = 16, classes: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    return torch.randn(32, inputs, generator=g), torch.randint(classes, (32,), generator=g)


def train(module: nn.Module, optimizer: Any, steps: range, *parts: Any) -> None:
    for n in steps:
        x, y = batch(n)
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        for part in parts:
            part.step(n, optimizer)
        optimizer.zero_grad()


def zeros(module: nn.Module) -> dict[str, int]:
    return {n: int((w == 0).sum()) for n, w in weights_of(module).items()}


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 98), st.sampled_from(sorted(SHAPES)), st.integers(1, 7),
    st.sampled_from(["layer", "global"]), st.booleans(), st.sampled_from(["l1", "taylor1"]),
)  # fmt: skip
def test_counts_are_exact_at_every_point(
    percent: int, shape: str, every: int, scope: str, regrow: bool, criterion: str
) -> None:
    module = net()
    optimizer = sgd(module)
    pruning = GradualPruning(
        module, f"{percent / 100}", start=2, end=12, every=every, schedule=shape, scope=scope,
        regrow=regrow, criterion=criterion,
    )  # fmt: skip
    sizes = {n: w.numel() for n, w in weights_of(module).items()}
    before = 0.0
    for n in range(1, 14):
        train(module, optimizer, range(n, n + 1), pruning)
        share = pruning.clock.schedule.at(n)
        gone = {name: int((~mask).sum()) for name, mask in pruning.masks.items()}
        if scope == "layer":
            assert gone == {name: round(share * size) for name, size in sizes.items()}
        assert sum(gone.values()) == pytest.approx(share * sum(sizes.values()), abs=1.01)
        for name, weight in weights_of(module).items():
            assert not weight[~pruning.masks[name]].any()
        assert pruning.share >= before
        before = pruning.share
    assert pruning.finish() is module


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_two_of_four_on_the_way_and_at_the_end(scope: str) -> None:
    module = net()
    optimizer = sgd(module)
    pruning = GradualPruning(module, "2:4", end=10, every=2, scope=scope)
    for n in range(1, 11):
        train(module, optimizer, range(n, n + 1), pruning)
        for mask in pruning.masks.values():
            assert (mask.view(-1, 4).sum(1) >= 2).all()
    for mask in pruning.masks.values():
        assert (mask.view(-1, 4).sum(1) == 2).all()
    for name, weight in pruning.compressed("bf16").items():
        assert str(weight.spec) == "bf16+2:4@magnitude"
        torch.testing.assert_close(weight.dense(), weights_of(module)[name], rtol=1e-2, atol=0)


def test_compressed_weights_are_the_modules() -> None:
    module = net()
    optimizer = sgd(module)
    pruning = GradualPruning(module, "0.8", end=10, every=2, scope="global")
    train(module, optimizer, range(1, 11), pruning)
    pruning.finish()
    for name, weight in pruning.compressed().items():
        assert torch.equal(weight.dense(), weights_of(module)[name])
        assert weight.nbytes() < 0.7 * 4 * weights_of(module)[name].numel()


def grown(regrow: bool) -> tuple[GradualPruning, Tensor, Tensor]:
    """A weight whose small half is pruned, then its large half shrinks below it."""
    module = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    pruning = GradualPruning(module, "0.5", end=4, every=2, schedule="one-shot", regrow=regrow)
    pruning.step(0)
    first = module.weight.detach().clone()
    with torch.no_grad():
        module.weight[0, 3] = 0.5
    pruning.step(2)
    return pruning, first, module.weight.detach()


def test_what_is_needed_after_all_grows_again_with_the_value_it_had() -> None:
    _, first, then = grown(regrow=True)
    assert first.tolist() == [[0, 0, 3, 4]]
    assert then.tolist() == [[0, 2, 3, 0]]


def test_without_regrowth_it_does_not() -> None:
    _, _, then = grown(regrow=False)
    assert then.tolist() == [[0, 0, 3, 0.5]]


def test_momentum_is_masked_and_mean_squares_are_not() -> None:
    for make in (sgd, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2)):
        module = net()
        optimizer = make(module)
        pruning = GradualPruning(module, "0.7", end=6)
        train(module, optimizer, range(1, 9), pruning)
        for name, weight in weights_of(module).items():
            own, gone = optimizer.state[weight], ~pruning.masks[name]
            for key in ("momentum_buffer", "exp_avg"):
                if key in own:
                    assert not own[key][gone].any()
                    assert own[key][~gone].any()
            if "exp_avg_sq" in own:
                assert own["exp_avg_sq"][gone].any()


@pytest.mark.parametrize("criterion", ["l1", "taylor2"])
def test_a_resumed_training_goes_the_same_way(criterion: str) -> None:
    def start() -> tuple[nn.Module, Any, GradualPruning]:
        module = net()
        options = {"start": 2, "end": 14, "every": 3, "criterion": criterion}
        return module, sgd(module), GradualPruning(module, "0.75", **options)  # type: ignore[arg-type]

    module, optimizer, pruning = start()
    train(module, optimizer, range(1, 21), pruning)
    half, half_optimizer, half_pruning = start()
    train(half, half_optimizer, range(1, 10), half_pruning)
    file = io.BytesIO()
    torch.save([half.state_dict(), half_optimizer.state_dict(), half_pruning.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, again_optimizer, again_pruning = start()
    again.load_state_dict(saved[0])
    again_optimizer.load_state_dict(saved[1])
    again_pruning.load_state_dict(saved[2])
    train(again, again_optimizer, range(10, 21), again_pruning)
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert zeros(again) == zeros(module)


@pytest.mark.parametrize("criterion", ["taylor1", "taylor2"])
def test_a_step_that_is_passed_over_leaves_no_trace(criterion: str) -> None:
    def pruned(overflows: bool) -> nn.Module:
        module = net()
        optimizer = sgd(module)
        pruning = GradualPruning(module, "0.5", start=4, end=12, every=4, criterion=criterion)
        for n in range(1, 16):
            train(module, optimizer, range(n, n + 1))
            x, y = batch(n)
            F.cross_entropy(module(x), y).backward()
            if overflows and n == 2:  # as a scaler of float16 leaves them where it makes no step
                module[0].weight.grad[0, 0] = float("inf")
            elif n == 2:
                optimizer.zero_grad()
            pruning.step(n)
            optimizer.zero_grad()
        return module

    with_it, without = pruned(True), pruned(False)
    assert zeros(with_it) == zeros(without)
    assert all(bool(w.isfinite().all()) for w in with_it.parameters())


def test_a_state_of_another_request_is_refused() -> None:
    state = GradualPruning(net(), "0.5", end=4).state_dict()
    with pytest.raises(WrongUse, match=r"sparsity='0.5' \(here '0.6'\)"):
        GradualPruning(net(), "0.6", end=4).load_state_dict(state)


def test_as_a_hook_of_a_loop() -> None:
    module = net()
    pruning = GradualPruning(module, "0.5", end=4)
    for hook in [pruning]:
        hook(4, 10)
    assert pruning.share == 0.5


def test_statistics_of_inputs_can_be_given() -> None:
    module = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    seen = {"weight": Stats(9, torch.tensor([100.0, 100.0, 1e-4, 1e-4]).diag())}
    pruning = GradualPruning(
        module, "0.5", end=0, schedule="one-shot", criterion="wanda", stats=lambda: seen
    )
    pruning.step(0)
    assert module.weight.tolist() == [[1, 2, 0, 0]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sparsity": "1.5"}, "sparsity `1.5` cannot be"),
        ({"sparsity": "0"}, "sparsity `0` cannot be"),
        ({"sparsity": "t0.1"}, "threshold"),
        ({"sparsity": "2:5"}, "multiple of 5"),
        ({"start": 9}, "from step 9 to step 4"),
        ({"scope": "block"}, "scope `block`"),
        ({"criterion": "fpgm"}, "judges whole outputs"),
        ({"criterion": "wanda"}, "needs statistics"),
        ({"names": ["0.bias"]}, "`0.bias` is no weight"),
        ({"names": []}, "nothing to prune"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(WrongUse, match=said):
        GradualPruning(net(), **{"sparsity": "0.5", "end": 4, **options})


def test_other_mistakes_are_told() -> None:
    with pytest.raises(WrongUse, match="ReLU has no weight"):
        GradualPruning(nn.ReLU(), "0.5", end=4)
    with pytest.raises(UnknownName, match="unknown criterion"):
        GradualPruning(net(), "0.5", end=4, criterion="l3")
    pruning = GradualPruning(net(), "0.5", end=4, criterion="taylor1")
    with pytest.raises(WrongUse, match="had no gradient"):
        pruning.step(4)
    module = net()
    with torch.no_grad():
        module[0].weight[0, 0] = torch.nan
    with pytest.raises(BadInput, match="NaN"):
        GradualPruning(module, "0.5", end=4).step(4)
    pruning = GradualPruning(net(), "0.5", end=4)
    pruning.step(3)
    with pytest.raises(WrongUse, match="step 2 comes after step 3"):
        pruning.step(2)
    with pytest.raises(WrongUse, match="stopped at step 3"):
        pruning.finish()


def test_an_earlier_state_put_back_is_noticed() -> None:
    module = net()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    pruning = GradualPruning(module, "0.5", end=4)
    train(module, sgd(module), range(1, 6), pruning)
    assert pruning.done
    module.load_state_dict(before)
    with pytest.raises(WrongUse, match="not zero where it is masked"):
        pruning.finish()


def test_masks_of_zeros_hold() -> None:
    module = net()
    with torch.no_grad():
        module[0].weight[3] = 0
    held = WeightMasks.of_zeros(module)
    train(module, sgd(module), range(1, 5), held)
    assert zeros(module) == {"0.weight": 16, "2.weight": 0}
    with pytest.raises(WrongUse, match=r"the mask of `0\.weight`"):
        WeightMasks(module, {"0.weight": torch.ones(3, 3, dtype=torch.bool)})


def test_masks_hold_under_a_parametrization() -> None:
    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    module = net()
    nn.utils.parametrize.register_parametrization(module[0], "weight", Twice())
    pruning = GradualPruning(module, "0.5", end=4)
    train(module, sgd(module), range(1, 6), pruning)
    assert pruning.masks.keys() == {"0.weight", "2.weight"}
    assert int((module[0].weight == 0).sum()) == 192


def test_survivors_go_back_to_their_early_values() -> None:
    module = net()
    rewind = Rewind(module, at=3)
    pruning = GradualPruning(module, "0.6", end=9)
    optimizer = sgd(module)
    with pytest.raises(WrongUse, match="kept at step 3"):
        rewind.restore({})
    train(module, optimizer, range(1, 4), rewind)
    early = {k: v.clone() for k, v in module.state_dict().items()}
    train(module, optimizer, range(4, 10), rewind, pruning)
    other = Rewind(module, at=3)
    other.load_state_dict(rewind.state_dict())
    held = other.restore(pruning.masks)
    for name, value in module.state_dict().items():
        mask = pruning.masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value, early[name] * mask)
    train(module, sgd(module), range(1, 4), held)
    assert zeros(module) == {n: int((~m).sum()) for n, m in pruning.masks.items()}
    with pytest.raises(WrongUse, match="step 3 never"):
        Rewind(module, at=3).step(4)


# -- what it buys


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten blurred shapes of 8x8 with shifts and noise: train and test images, flat, and labels."""
    g = torch.Generator().manual_seed(5)
    shapes = F.interpolate(torch.randn(10, 1, 4, 4, generator=g), size=10, mode="bilinear")
    y = torch.randint(10, (3000,), generator=g)
    row, column = torch.randint(3, (2, 3000), generator=g).tolist()
    x = torch.stack(
        [shapes[k, 0, r : r + 8, c : c + 8] for k, r, c in zip(y, row, column, strict=True)]
    )
    x = x.flatten(1) + 0.9 * torch.randn(3000, 64, generator=g)
    return x[:2000], y[:2000], x[2000:], y[2000:]


def accuracy(start: int, end: int, schedule: str, seed: int) -> float:
    """After 400 steps of training, 80 % of the weights pruned on the way."""
    x, y, test_x, test_y = digits()
    module = net(seed=seed, inputs=64, hidden=32, classes=10)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    pruning = GradualPruning(module, "0.8", start=start, end=end, every=10, schedule=schedule)
    g = torch.Generator().manual_seed(seed)
    for n in range(1, 401):
        pick = torch.randint(len(x), (64,), generator=g)
        F.cross_entropy(module(x[pick]), y[pick]).backward()
        optimizer.step()
        pruning.step(n, optimizer)
        optimizer.zero_grad()
    pruning.finish()
    assert pruning.share == pytest.approx(0.8, abs=1e-3)
    return float((module(test_x).argmax(1) == test_y).float().mean())


def test_gradual_pruning_keeps_more_than_one_shot() -> None:
    """Dense: 91.6 %. One shot with no training after it, with as much as gradual ends with, and
    with as much as gradual begins with."""
    seeds = (3, 4, 5)
    gradual = sum(accuracy(100, 300, "cubic", seed) for seed in seeds) / len(seeds)
    assert gradual > 0.88
    for at, margin in ((400, 0.08), (300, 0.01), (100, 0.01)):
        one_shot = sum(accuracy(at, at, "one-shot", seed) for seed in seeds) / len(seeds)
        assert gradual > one_shot + margin
