"""Networks with sparse weights, their checkpoints, and rates from the allocator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lighten
from lighten.allocate import allocate
from lighten.candidates import candidates
from lighten.errors import BadInput, WrongUse
from lighten.exporters.checkpoint import Checkpoint
from lighten.gradients import gradients, with_gradients
from lighten.moments import hessians
from lighten.network import Network
from lighten.quantized import Edge, Quantized
from lighten.registry import exporters
from lighten.simulate import Simulation
from lighten.sparse import format_of, unpack_mask
from lighten.sparsify import sparsify, with_weights
from lighten.types import Compressed, Spec


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.second = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(24, 10)
        self.tied = nn.Linear(24, 10, bias=False)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.first(x)).relu())
        x = self.second(x).relu().mean((2, 3))
        y: Tensor = 4 * (self.head(x) + self.tied(x.sin()))
        return y


def network() -> Network:
    return Network.of(Small(), torch.zeros(2, 3, 8, 8))


def data(count: int = 64) -> Tensor:
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x + 0.7 * x.roll(1, -1)


def specs(solver: str) -> dict[str, Spec]:
    texts = {
        "first.weight": f"f32+0.5@{solver}",
        "depthwise.weight": f"f32+0.33@{solver}",
        "second.weight": f"int8_channel_sym+2:4@{solver}",
        "tied.weight": f"f16+0.4@{solver}",  # as the graph calls both
    }
    return {name: Spec.parse(text) for name, text in texts.items()}


def missed(a: Network, b: Network) -> float:
    x = data(128)
    return float((a(x) - b(x)).square().mean())


def test_a_sparse_network_computes_with_its_sparse_weights() -> None:
    net = network()
    before = net.digest
    small, weights = sparsify(net, data(), specs("obs"))
    assert net.digest == before
    state = small.module.state_dict()
    for name, weight in weights.items():
        assert torch.equal(state[name].flatten(1), weight.dense())
        assert str(weight.spec) == str(specs("obs")[name])
    assert torch.equal(state["tied.weight"], state["head.weight"])
    assert int((state["first.weight"] == 0).sum()) == 16 * 27 // 2
    assert ((state["second.weight"].view(-1, 4) != 0).sum(1) <= 2).all()
    stays = unpack_mask(weights["depthwise.weight"].parts["mask"], 9)
    assert (stays.sum(1) == 6).all()  # a share of each group
    assert torch.equal(state["first.bias"], net.module.state_dict()["first.bias"])


def test_obs_keeps_the_outputs_better_than_the_plain_solvers() -> None:
    net = network()
    lost = {s: missed(net, sparsify(net, data(), specs(s))[0]) for s in ("obs", "wanda")}
    lost["magnitude"] = missed(net, sparsify(net, data(), specs("magnitude"))[0])
    assert lost["obs"] < 0.8 * lost["wanda"]
    assert lost["obs"] < 0.8 * lost["magnitude"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("norm.weight", "f32+0.5", "no weight of a convolution"),
        ("first.weight", "f32+2:4", "multiple of 4"),
        ("first.weight", "int8_g32+0.5", "multiple of 32"),
        ("first.weight", "q4_0+0.5", "no room for a mask"),
    ],
)
def test_what_cannot_be_sparse_is_refused(name: str, text: str, words: str) -> None:
    with pytest.raises(WrongUse, match=words):
        sparsify(network(), data(8), {name: Spec.parse(text)})


def test_rates_come_from_the_allocator() -> None:
    """Candidates of several rates, bytes exact; a budget gives layers different rates."""
    net, x = network(), data()
    seen = with_gradients(hessians(net, x), gradients(net, x[:32]))
    state, rates = net.module.state_dict(), [f"f32+0.{i}@obs" for i in range(1, 10)]
    layers = [layer for layer in net.layers if layer.name != "depthwise.weight"]
    found = []
    for layer in layers:
        options = [Spec.parse(r) for r in rates]
        sizes = {str(s): round(format_of(s).bits(layer.shape[1]) * layer.size / 8) for s in options}
        matrix = state[layer.name].flatten(1)
        mine = candidates(layer, matrix, seen[layer.name], options, sizes)
        assert [c.error for c in mine] == sorted(c.error for c in mine)
        found += mine
    limit = sum(int(c.cost["bytes"]) for c in found if "+0.6@" in c.specs[c.unit])
    plan = allocate(found, limit)
    small, weights = sparsify(net, x, {k: Spec.parse(v) for k, v in plan.specs.items()}, seen)
    total = sum(w.nbytes() for w in weights.values())
    assert abs(total - plan.predicted["bytes"]) <= 4 * len(weights)
    assert total <= limit + 4 * len(weights)
    assert len(set(plan.specs.values())) > 1
    even, _ = sparsify(net, x, {la.name: Spec.parse("f32+0.6@obs") for la in layers}, seen)

    def divergence(other: Network) -> float:
        p, q = (n(data(256)).log_softmax(-1) for n in (net, other))
        return float((p.exp() * (p - q)).sum(1).mean())

    assert divergence(small) < divergence(even)


# -- checkpoints -----------------------------------------------------------------------------------
def sparse() -> Quantized:
    net = network()
    small, weights = sparsify(net, data(), specs("obs"))
    return Quantized(small, weights, {"x": Edge(0.1, 3), "relu": Edge(0.02, 0, 4, True)})


def test_a_checkpoint_holds_sparse_weights_as_they_are(tmp_path: Path) -> None:
    given = sparse()
    exporter = Checkpoint(kept={"first.weight": [0, 2, 5]}, provenance={"seed": 7})
    exporter.write(given, tmp_path / "out")
    assert exporter.nbytes(given) == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    found = exporter.open(tmp_path / "out")
    assert dict(found.edges) == given.edges
    assert found.kept == {"first.weight": [0, 2, 5]}
    assert found.provenance == {"source": "Small", "seed": 7}
    assert set(found.weights) == set(given.weights)
    for name, weight in given.weights.items():
        back: Compressed = found.weights[name]
        assert back.nbytes() == weight.nbytes()
        assert back.parts.keys() == weight.parts.keys()
        assert all(torch.equal(back.parts[k], p) for k, p in weight.parts.items())
    state = given.network.module.state_dict()
    assert list(found.tensors) == list(state)
    for name, t in state.items():
        assert torch.equal(found.tensors[name], t), name
    fresh = Small()
    fresh.load_state_dict(dict(found.tensors))
    x = data(4)
    assert torch.equal(fresh.eval()(x), given.network(x))


def test_a_checkpoint_is_opened_as_a_module(tmp_path: Path) -> None:
    given = sparse()
    exporters["checkpoint"].write(given, tmp_path / "out")
    opened = lighten.load(Small, tmp_path / "out")
    assert torch.equal(opened(data(4)), Simulation(given)(data(4)))
    assert torch.equal(opened.train().eval()(data(4)), Simulation(given)(data(4)))
    exporters["checkpoint"].write(network(), tmp_path / "plain")
    plain = lighten.load(Small, tmp_path / "plain")
    assert type(plain) is Small
    assert not plain.training
    assert torch.equal(plain(data(4)), network()(data(4)))


def test_a_checkpoint_of_another_network_is_not_opened(tmp_path: Path) -> None:
    exporters["checkpoint"].write(sparse(), tmp_path / "out")
    with pytest.raises(BadInput, match="differ in"):
        lighten.load(lambda: nn.Sequential(Small()), tmp_path / "out")
    about = tmp_path / "out" / "lighten.json"
    body = json.loads(about.read_text())
    for built, words in (({"inputs": [[[2], "no"]]}, "damaged"), ({"inputs": []}, "write it")):
        about.write_text(json.dumps({**body, "built": built}))
        with pytest.raises(BadInput) as caught:
            lighten.load(Small, tmp_path / "out")
        assert words in f"{caught.value.message} {caught.value.hint}"


def test_other_tools_can_open_it_and_it_is_smaller(tmp_path: Path) -> None:
    given = sparse()
    exporter = exporters["checkpoint"]
    exporter.write(given, tmp_path / "sparse")
    exporter.write(network(), tmp_path / "dense")
    stored = load_file(tmp_path / "sparse" / "model.safetensors")
    assert torch.equal(stored["first.bias"], given.network.module.state_dict()["first.bias"])
    assert not {"tied.weight", "head.weight"} & set(stored)  # in parts, once
    saved = sum(4 * w.shape[0] * w.shape[1] - w.nbytes() for w in given.weights.values())
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("dense", "sparse")]
    assert saved - 1200 < sizes[0] - sizes[1] < saved + 1200  # names of parts in the header


@pytest.mark.parametrize("what", ["version", "spec", "order", "codes", "truncated"])
def test_damaged_checkpoints_are_refused(tmp_path: Path, what: str) -> None:
    exporters["checkpoint"].write(sparse(), tmp_path / "out")
    about = tmp_path / "out" / "lighten.json"
    body = json.loads(about.read_text())
    if what == "version":
        body["lighten"] = 99
    elif what == "spec":
        body["weights"]["first.weight"]["spec"] = "f16+0.5"  # as many bytes are not there
    elif what == "order":
        body["order"].pop()
    elif what == "codes":
        del body["weights"]["first.weight"]
    else:
        file = tmp_path / "out" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
    about.write_text(json.dumps(body))
    with pytest.raises(BadInput):
        dict(exporters["checkpoint"].read(tmp_path / "out"))


def test_weights_can_be_put_in_apart() -> None:
    given = sparse()
    again = with_weights(network(), given.weights)
    assert again.digest == given.network.digest
