"""What is seen of a network, and which places of two go together."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lighten.coupling import couple
from lighten.errors import BadInput, WrongUse
from lighten.lesson import Lesson
from lighten.network import Network
from lighten.places import places
from lighten.showing import Showing
from lighten.shrink import shrink
from lighten.watch import outputs_of, pairs, watch
from patterns import PATTERNS
from small_networks import Plain, Residual, images, trained


class Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, 3, stride, 1)
        self.skip = nn.Conv2d(width, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + self.skip(x))


class Stages(nn.Module):
    """Two stages of `depth` blocks, under names of one's choice."""

    def __init__(self, depth: int, width: int = 4, names: tuple[str, str] = ("a", "b")) -> None:
        super().__init__()
        self.names = names
        for i, name in enumerate(names):
            first = Block(3 if i == 0 else width, width, 2)
            rest = [Block(width, width) for _ in range(depth - 1)]
            self.add_module(name, nn.Sequential(first, *rest))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = self.get_submodule(name)(x)
        return self.head(x.mean((2, 3)))


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


# what is seen


def test_places_and_outputs_are_seen_with_their_gradients() -> None:
    module, x = Stages(2), images(3)
    with watch(module, ["b.1", "a.0"]) as see:
        seen = see(x)
    assert list(seen.hidden) == ["b.1", "a.0"]
    assert seen.hidden["a.0"].shape == (3, 4, 8, 8)
    assert torch.equal(seen.outputs, module(x))
    assert torch.equal(seen.hidden["a.0"], module.get_submodule("a")[0](x))  # type: ignore[index]
    seen.hidden["b.1"].sum().backward()
    assert next(module.parameters()).grad is not None
    assert hooks(module) == 0


def test_nothing_of_one_call_is_left_for_the_next() -> None:
    module = Stages(1)
    with watch(module, ["a.0"]) as see:
        first, second = see(images(2)), see(images(3))
        assert (len(first.hidden["a.0"]), len(second.hidden["a.0"])) == (2, 3)
        with pytest.raises(WrongUse, match=r"nothing was seen at `a\.0`"):
            see.seen(torch.zeros(2, 5))
        assert len(see.seen(module(images(4))).hidden["a.0"]) == 4


def test_hooks_go_when_something_fails() -> None:
    module = Stages(1)
    with pytest.raises(RuntimeError), watch(module, ["a.0"]) as see:
        see(torch.zeros(2, 7, 8, 8))
    assert hooks(module) == 0
    with pytest.raises(WrongUse, match=r"no place `a.O`"), watch(module, ["a.0", "a.O"]):
        pass
    assert hooks(module) == 0


def test_a_wrapped_module_is_seen_by_what_it_gives() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    module = Stages(1)
    wrapped = Wrapper(module)
    with watch(module, ["b.0"]) as see:
        assert see.seen(wrapped(images(2))).hidden["b.0"].shape == (2, 4, 4, 4)


def test_checkpointed_blocks_are_seen_once() -> None:
    class Thrifty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(3, 3) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x.flatten(1)

    module = Thrifty()
    assert places(module) == ["blocks.0", "blocks.1"]
    with watch(module, ["blocks.0"]) as see, set_checkpoint_early_stop(False):
        seen = see(images(2))
        (seen.outputs.square().sum() + seen.hidden["blocks.0"].sum()).backward()
        with pytest.raises(WrongUse):  # the second computation left nothing
            see.seen(seen.outputs)
    assert next(module.parameters()).grad is not None


@pytest.mark.parametrize("kind", [Plain, Residual, lambda: Stages(2)])
def test_an_exported_graph_shows_what_its_module_shows(kind: Callable[[], nn.Module]) -> None:
    x = images(2)
    module = trained(kind)  # type: ignore[arg-type]
    network = Network.of(module, x)
    for graph in (network.graph, network.flexible):
        code = graph.code
        assert pairs(graph, module) == [(name, name) for name in places(module)]
        with watch(module, places(module)) as a, watch(graph, places(graph)) as b:
            one, other = a(x), b(x)
        assert graph.code == code
        for name, value in one.hidden.items():
            assert torch.allclose(value, other.hidden[name], atol=1e-5)
        with pytest.raises(WrongUse, match="did you mean"), watch(graph, ["hea"]):
            pass


def test_a_shrunk_graph_has_the_places_of_what_it_was_made_of() -> None:
    module, inputs = PATTERNS["padded_shortcut"].make()
    network = Network.of(module, inputs)
    couplings = couple(network)
    keep = {"c.weight": torch.arange(3), "d.weight": torch.tensor([0, 1, 3])}
    small = shrink(network, couplings, keep)
    assert isinstance(small.module, fx.GraphModule)
    found = pairs(small.module, module, inputs)
    assert found == [(name, name) for name in places(module)]
    with watch(small.module, ["c"]) as see:
        assert see(inputs).hidden["c"].shape[1] == 3


def test_a_graph_inside_a_module_is_seen_however_it_is_run() -> None:
    class Interpreted(nn.Module):
        def __init__(self, graph: fx.GraphModule) -> None:
            super().__init__()
            self.graph = graph

        def forward(self, x: Tensor) -> Any:
            return fx.Interpreter(self.graph).run(x)

    module, x = Stages(2).eval(), images(2)
    twin = Interpreted(Network.of(module, x).graph)
    assert places(twin) == places(module)
    with watch(twin, ["b.0"]) as see, watch(module, ["b.0"]) as of:
        assert torch.allclose(see(x).hidden["b.0"], of(x).hidden["b.0"], atol=1e-5)


def test_under_autocast_features_are_as_they_come() -> None:
    module = Stages(1)
    with watch(module, ["b.0"]) as see, torch.autocast("cpu", torch.bfloat16):
        seen = see(images(2))
        total, _ = Lesson.parse("logits,blocks,attention_transfer")(seen, seen)
    assert seen.hidden["b.0"].dtype == torch.bfloat16
    assert total.dtype == torch.float32


# outputs


def test_logits_are_found_in_what_networks_return() -> None:
    x = torch.randn(2, 5)
    for given in (x, (x, None), [x], {"loss": torch.tensor(1.0), "logits": x}, {"scores": x}):
        assert outputs_of(given) is x
    assert outputs_of(torch.zeros(2, 5, 8, 9)).shape == (2, 8, 9, 5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"a": torch.rand(2, 5), "b": torch.rand(2, 5)}, "gives a, b"),
        (None, "a NoneType"),
        ((), "a tuple"),
        ((None, torch.rand(2, 5)), "a tuple"),
        (torch.rand(5), r"\(5,\)"),
        (torch.ones(2, 5, dtype=torch.int64), "int64"),
    ],
)
def test_outputs_without_logits_are_refused(given: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        outputs_of(given)


# attention


def test_attention_maps_of_torch_are_seen_for_each_head() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        before = module(x)
        with watch(module, places(module), attention=True) as see:
            seen = see(x)
    assert list(seen.attention) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all(maps.shape == (2, 4, 5, 5) for maps in seen.attention.values())
    assert torch.allclose(seen.attention["layers.0.self_attn"].sum(-1), torch.ones(()))
    assert torch.allclose(seen.outputs, before, atol=1e-5)
    assert hooks(module) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_language_models_show_logits_blocks_and_maps(
    family: str, tiny: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny(family), attn_implementation="eager").eval()
    ids = torch.arange(14).view(2, 7)
    found = places(model)
    assert [name.rpartition(".")[2] for name in found] == ["0", "1"]
    with torch.no_grad(), watch(model, found, attention=True) as see:
        seen, again = see({"input_ids": ids}), see(ids)
    assert seen.outputs.shape[:2] == (2, 7)
    assert all(x.shape == (2, 7, 64) for x in seen.hidden.values())
    assert [x.shape for x in seen.attention.values()] == [(2, 4, 7, 7)] * 2
    total, values = Lesson.parse("logits,topk:1:k=9,hidden,attention,relations")(seen, again)
    assert float(total) < 1e-5
    assert len(values) == 5


def test_maps_that_no_module_returns_are_asked_for(tiny: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), attn_implementation="sdpa")
    with pytest.raises(WrongUse, match="attn_implementation"), watch(model, attention=True) as see:
        see(torch.arange(6).view(1, 6))


# pairs


def test_networks_with_the_same_blocks_are_paired_by_name() -> None:
    assert pairs(Stages(2), Stages(2, width=6)) == [(n, n) for n in ("a.0", "a.1", "b.0", "b.1")]


@pytest.mark.parametrize("x", [None, images(2)])
def test_shallower_networks_are_paired_by_depth_within_stages(x: Tensor | None) -> None:
    shallow, deep = Stages(2), Stages(6, names=("first", "second"))
    expected = [
        ("a.0", "first.2"), ("a.1", "first.5"), ("b.0", "second.2"), ("b.1", "second.5")
    ]  # fmt: skip
    assert pairs(shallow, deep, x) == expected
    assert pairs(shallow, deep, x, ends=True) == expected[1::2]
    assert pairs(deep, shallow, x, ends=True) == [(t, s) for s, t in expected[1::2]]
    assert shallow.training
    assert hooks(deep) == 0


def test_stages_of_other_structure_are_paired_by_size_in_space() -> None:
    wide = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip
    found = pairs(wide, Stages(2), images(2), ends=True)
    assert found == [("1", "a.1"), ("3", "b.1")]
    shapes = []
    for module, names in zip((wide, Stages(2)), zip(*found, strict=True), strict=True):
        with watch(module, names) as see:
            shapes.append([x.shape[2:] for x in see(images(2)).hidden.values()])
    assert shapes[0] == shapes[1]


def test_looking_leaves_norms_and_modes_as_they_were() -> None:
    module = trained(Residual)
    module.train()
    module.bn1.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    pairs(module, trained(Plain), images(2))
    assert module.training
    assert not module.bn1.training
    assert all(torch.equal(before[n], v) for n, v in module.state_dict().items())


def test_a_network_without_blocks_has_to_be_told() -> None:
    with pytest.raises(WrongUse, match="no blocks to compare"):
        pairs(nn.Linear(3, 4), Stages(1))


def test_a_lesson_of_the_ends_alone_looks_at_the_last_block_of_each_stage() -> None:
    student, teacher, x = Stages(2), Stages(3, 8), images(2)
    for text, seen in (
        ("hidden:1:places=ends", ["a.1", "b.1"]),
        ("logits:1,hidden:1", ["a.0", "a.1", "b.0", "b.1"]),
        ("hidden:1:places=ends,relations:1", ["a.0", "a.1", "b.0", "b.1"]),
    ):
        showing = Showing(student, teacher, Lesson.parse(text), x, nullcontext)
        taught = showing.taught(x)
        showing.close()
        assert taught is not None
        assert list(taught.hidden) == seen
