"""Shrinking: what is refused, what a module's own attributes become, and what is saved."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lighten.compare_outputs import difference
from lighten.coupling import analyse, couple
from lighten.errors import BadInput, BadOutput, WrongUse
from lighten.network import Network
from lighten.saved import load, save
from lighten.shrink import masked, shrink
from patterns import PATTERNS, Run, conv, image, lively


def network_of(name: str) -> Network:
    return Network.of(*PATTERNS[name].make())


def test_the_users_module_is_not_touched() -> None:
    module, inputs = PATTERNS["residual"].make()
    before = {k: t.clone() for k, t in module.state_dict().items()}
    network = Network.of(module, inputs)
    couplings = couple(network)
    shrink(network, couplings, {"b.weight": torch.tensor([0, 3])})
    assert all(torch.equal(t, before[k]) for k, t in module.state_dict().items())


def test_standard_modules_learn_their_sizes() -> None:
    network = network_of("depthwise")
    small = shrink(network, couple(network), {"0.weight": torch.tensor([1, 4, 6])}).module
    first, norm, depth, point = (small.get_submodule(i) for i in "0136")
    assert isinstance(depth, nn.Conv2d)
    assert (first.out_channels, norm.num_features) == (3, 3)
    assert (depth.in_channels, depth.out_channels, depth.groups) == (3, 3, 3)
    assert (point.in_channels, point.out_channels) == (3, 12)


def test_grouped_convolutions_keep_their_groups_and_norms_lose_them() -> None:
    network = network_of("grouped")
    small = shrink(network, couple(network), {"0.weight": torch.tensor([0, 2, 3])}).module
    assert small.get_submodule("2").groups == 2
    assert small.get_submodule("2").in_channels == 6
    network = network_of("group_norm")
    small = shrink(network, couple(network), {"0.weight": torch.tensor([0, 2, 3])}).module
    assert (small.get_submodule("1").num_groups, small.get_submodule("1").num_channels) == (3, 6)


def test_recurrent_and_attention_modules_learn_their_sizes() -> None:
    network = network_of("lstm")
    keep = {"lstm.weight_ih_l0": torch.tensor([0, 5]), "table.weight": torch.arange(3)}
    small: Any = shrink(network, couple(network), keep).module
    assert (small.lstm.hidden_size, small.lstm.input_size) == (2, 3)
    assert small.table.embedding_dim == 3
    network = network_of("grouped_query_rotary")
    small = shrink(network, couple(network), {"q.weight": torch.tensor([1])}).module
    assert (small.num_heads, small.num_kv_heads, small.size) == (2, 1, 6)


def test_tied_weights_stay_tied() -> None:
    network = network_of("tied_embedding")
    small: Any = shrink(network, couple(network), {"table.weight": torch.tensor([0, 2])}).module
    assert small.head.weight is small.table.weight
    assert small.head.in_features == 2


def test_roles_of_a_member_say_what_a_weight_does() -> None:
    couplings = couple(network_of("residual"))
    assert {m.parameter for m in couplings.writers("a.weight")} == {"a.weight", "c.weight"}
    assert {m.parameter for m in couplings.readers("a.weight")} == {"b.weight", "d.weight"}
    carriers = {m.parameter for m in couplings["a.weight"].members if m.role == "carries"}
    assert {"a.bias", "na.weight", "nc.running_var"} <= carriers
    assert couple(network_of("grouped_query_rotary"))["q.weight"].kind == "heads"
    assert couple(network_of("group_norm"))["0.weight"].kind == "groups"


def test_a_head_is_removed_with_its_queries_keys_values_and_outputs() -> None:
    axis = couple(network_of("grouped_query_rotary"))["q.weight"]
    widths = {(m.parameter, m.dim): m.index.shape[1] for m in axis.members}
    assert widths == {
        ("q.weight", 0): 12, ("q.bias", 0): 12, ("k.weight", 0): 6, ("k.bias", 0): 6,
        ("v.weight", 0): 6, ("v.bias", 0): 6, ("o.weight", 1): 12,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "axis", "reason"),
    [
        ("plain", "5.weight", "output"),
        ("plain", "0.weight[1]", "cannot shrink"),
        ("layer_norm", "stem.weight", "layer_norm"),
        ("written_out_rms_norm", "stem.weight", "mean"),
        ("tied_embedding", "table.weight:2", "looked up"),
        ("unknown_operator", "a.weight", "`sort` has no rule"),
    ],
)
def test_locked_axes_say_why(name: str, axis: str, reason: str) -> None:
    network = network_of(name)
    couplings = couple(network)
    assert reason in (couplings[axis].locked or "")
    with pytest.raises(WrongUse, match="cannot shrink"):
        shrink(network, couplings, {axis: torch.arange(1)})


def test_an_operator_without_a_rule_is_named() -> None:
    assert couple(network_of("unknown_operator")).unknown == {"sort": ["sort"]}


def test_a_use_that_a_rule_does_not_know_locks_what_it_touches(monkeypatch: Any) -> None:
    from lighten.coupling import trace

    def narrow_minded(t: Any, a: Any) -> Any:
        raise KeyError("axis")

    monkeypatch.setitem(trace.RULES, "batch_norm", narrow_minded)
    couplings = couple(network_of("plain"))
    assert "KeyError" in (couplings["0.weight"].locked or "")
    assert couplings.unknown == {"batch_norm": ["batch_norm"]}
    assert couplings["3.weight"].locked is None


@pytest.mark.parametrize(
    "kept", [[], [0, 0], [1, 0], [-1, 2], [0, 8], [[0], [1]], [0.0, 1.0]], ids=str
)
def test_units_that_are_not_there_are_refused(kept: list[Any]) -> None:
    network = network_of("plain")
    dtype = None if kept else torch.int64
    with pytest.raises(WrongUse):
        shrink(network, couple(network), {"0.weight": torch.tensor(kept, dtype=dtype)})
    with pytest.raises(WrongUse, match="no axis is called"):
        shrink(network, couple(network), {"0.wieght": torch.arange(2)})


def test_what_does_not_equal_the_masked_network_is_refused(monkeypatch: Any) -> None:
    """A wrong rule is caught: `couple` locks the axis, `shrink` raises."""
    from lighten.coupling import trace

    network = network_of("layer_norm")
    monkeypatch.setitem(trace.RULES, "layer_norm", trace.RULES["relu"])
    wrong = analyse(network)
    assert wrong["stem.weight"].locked is None
    with pytest.raises(BadOutput, match=r"stem\.weight"):
        shrink(network, wrong, {"stem.weight": torch.arange(6)})
    couplings = couple(network)
    assert "does not equal" in (couplings["stem.weight"].locked or "")
    assert couplings["up.weight"].locked is None


def test_constant_example_inputs_do_not_hide_differences(monkeypatch: Any) -> None:
    from lighten.coupling import trace

    module, (x,) = PATTERNS["layer_norm"].make()
    for name, t in module.named_parameters():
        if name.endswith("bias"):
            t.data.zero_()  # so that zeros in give zeros out, whatever is removed
    network = Network.of(module, torch.zeros_like(x))
    monkeypatch.setitem(trace.RULES, "layer_norm", trace.RULES["relu"])
    assert couple(network)["stem.weight"].locked is not None


def test_sizes_in_a_forward_make_it_a_graph_for_any_batch() -> None:
    network = network_of("padded_shortcut")
    couplings = couple(network)
    keep = {"stem.weight": torch.tensor([0, 2]), "d.weight": torch.tensor([0, 1, 3])}
    small = shrink(network, couplings, keep)
    assert "graph" in small.notes[0]
    assert len(small.notes) == 1
    x = torch.randn(5, 3, 8, 8)
    expected = masked(network, couplings, keep)(x)
    torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-6)


def test_a_forward_for_one_batch_size_says_so() -> None:
    def forward(m: Run, x: Tensor) -> Tensor:
        return m.head(torch.relu(m.a(x)).view(2, 8, 64).mean(-1))

    module = lively(Run(forward, a=conv(3, 8), head=nn.Linear(8, 3)))
    network = Network.of(module, image())
    small = shrink(network, couple(network), {"a.weight": torch.arange(5)})
    assert "a batch of 2 only" in small.notes[1]


def test_meta_weights_suffice() -> None:
    module, inputs = PATTERNS["grouped_query_rotary"].make()
    del module.freq  # the rotary table is computed where the weights are
    network = Network.of(module.to("meta"), tuple(x.to("meta") for x in inputs))
    couplings = couple(network)
    assert {a.name: a.width for a in couplings.free} == {"q.weight": 2}
    small = shrink(network, couplings, {"q.weight": torch.arange(1)})
    assert small.module.q.weight.shape == (12, 16)  # type: ignore[union-attr]


def factory_of(name: str) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        module = PATTERNS[name].make()[0]
        for t in module.parameters():
            nn.init.normal_(t)
        return module

    return factory


@pytest.mark.parametrize(
    "name", ["residual", "padded_shortcut", "lstm", "tied_embedding", "multihead_attention"]
)
def test_a_saved_network_is_loaded_from_the_factory(name: str, tmp_path: Path) -> None:
    network = network_of(name)
    couplings = couple(network)
    keep = {a.name: torch.arange(1, a.width) for a in couplings.free}
    small = shrink(network, couplings, keep)
    save(small, tmp_path / "small", couplings, keep)
    assert {p.suffix for p in (tmp_path / "small").iterdir()} == {".safetensors", ".json"}
    again = load(factory_of(name), tmp_path / "small")
    stored, kept = again.state_dict(), small.module.state_dict()
    assert stored.keys() == kept.keys()
    assert all(torch.equal(stored[key], kept[key]) for key in kept)
    # where weights lie in memory may decide by which kernel they are multiplied
    torch.testing.assert_close(again(*network.inputs), small(*network.inputs))


def test_a_folder_of_another_network_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    network = network_of("plain")
    couplings = couple(network)
    keep = {"0.weight": torch.arange(3)}
    small = shrink(network, couplings, keep)
    folder = tmp_path / "small"
    save(small, folder, couplings, keep)
    with pytest.raises(BadInput, match="not made from this network"):
        load(factory_of("residual"), folder)
    other = nn.Sequential(*copy.deepcopy(list(network.module.children())))
    other[3] = conv(8, 5)
    other[5] = conv(5, 4)
    with pytest.raises(BadInput, match=r"3\.weight"):
        load(lambda: other, folder)

    kept = json.loads((folder / "kept.json").read_text())
    for change in ({"digest": "0"}, {"keep": {"0.weight": [0, 99, 3]}}, {"inputs": [["a", "b"]]},
                   {"keep": [1]}, {"inputs": [[[1, 3, 8, 8], "__doc__"]]}):  # fmt: skip
        (folder / "kept.json").write_text(json.dumps(kept | change))
        with pytest.raises(BadInput):
            load(factory_of("plain"), folder)
    (folder / "kept.json").write_text(json.dumps(kept))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="cannot be read"):
        load(factory_of("plain"), folder)


@pytest.fixture(scope="module")
def causal(tiny: Callable[..., Path]) -> Callable[[str], Network]:
    def make(family: str) -> Network:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
        model.config.use_cache = False
        return Network.of(model, torch.arange(8).reshape(1, 8))

    return make


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_transformers_model_is_built_by_plain_from_pretrained(
    family: str, causal: Callable[[str], Network], tmp_path: Path
) -> None:
    network = causal(family)
    couplings = couple(network)
    assert {a.kind for a in couplings.free} == {"heads", "channels"}
    keep = {a.name: torch.arange(a.width // 2) for a in couplings.free}
    small = shrink(network, couplings, keep)
    assert not small.notes
    save(small, tmp_path / "small", couplings, keep)
    kind: Any = type(small.module)
    again = kind.from_pretrained(tmp_path / "small")
    again.config.use_cache = False
    assert difference(Network(again.eval(), network.inputs), small) == 0
    loaded = load(lambda: copy.deepcopy(network.module), tmp_path / "small")
    assert difference(Network(loaded, network.inputs), small) == 0


def test_a_configuration_that_cannot_say_the_shape_is_not_written(
    causal: Callable[[str], Network], tmp_path: Path
) -> None:
    network = causal("llama")
    couplings = couple(network)
    mlp = next(a for a in couplings.free if a.kind == "channels")
    keep = {mlp.name: torch.arange(mlp.width // 2)}
    small = shrink(network, couplings, keep)
    assert "they differ" in small.notes[0]
    save(small, tmp_path / "small", couplings, keep)
    assert not (tmp_path / "small" / "config.json").exists()
    loaded = load(lambda: copy.deepcopy(network.module), tmp_path / "small")
    assert difference(Network(loaded, network.inputs), small) == 0


def test_the_shared_resnet(shared: Path) -> None:
    """Residual streams with padded shortcuts form axes; all of them shrink at once."""
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file

    weights = load_file(shared / "models" / "resnet20_cifar10.safetensors")
    module = _ResNet(3)
    module.load_state_dict(weights, strict=False)
    network = Network.of(module, torch.randn(1, 3, 32, 32))
    couplings = couple(network)
    streams = {a.name: a.width for a in couplings.free if "conv2" in a.name or a.name[0] == "c"}
    assert streams == {
        "conv1.weight": 16, "layer2.0.conv2.weight": 16, "layer3.0.conv2.weight": 32
    }  # fmt: skip
    assert len(couplings.free) == 12
    keep = {a.name: torch.arange(0, a.width, 2) for a in couplings.free}
    small = shrink(network, couplings, keep)
    assert small.parameters < network.parameters / 3


class _Block(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, o // i, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(o), nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.pad = (o - i) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.pad:
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return (x + y).relu()


class _ResNet(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [16, 16, 32, 64]
        for k in (1, 2, 3):
            blocks = [_Block(widths[k - 1] if i == 0 else widths[k], widths[k]) for i in range(n)]
            setattr(self, f"layer{k}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        for k in (1, 2, 3):
            x = getattr(self, f"layer{k}")(x)
        return self.linear(x.mean((2, 3)))
