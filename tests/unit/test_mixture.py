"""Networks whose layers have formats of their own: what is rounded, and what that computes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lighten.errors import BadInput, WrongUse
from lighten.mixture import Touch, layers, quantize_mixed, touching
from lighten.network import Network
from lighten.quantize_network import quantize
from lighten.registry import transforms
from lighten.rewrite import editable
from lighten.simulate import Simulation
from lighten.types import Spec
from small_networks import Plain, images, trained

X = images(48)
NET = Network.of(trained(), X[:2])
INT8 = Spec.parse("int8_channel_sym+a8@gptq")
INT4 = Spec.parse("int4_channel_sym+a8@gptq")
NAMES = ["stem.weight", "conv1.weight", "conv2.weight", "head.weight"]


def test_a_tensor_touches_the_layers_at_it_or_the_nearest() -> None:
    graph = editable(transforms["fold_batchnorm"](NET))
    assert layers(graph) == NAMES
    found = touching(graph)
    direct = {touch.names for touch in found.values() if not touch.nearest}
    stem, one, two, head = NAMES
    assert direct == {
        frozenset(names) for names in ([stem], [stem, one], [one, two], [two], [head])
    }
    [total] = [touch for touch in found.values() if touch.nearest]  # the sum, read by a mean
    assert {two, head} <= total.names


def test_either_layer_rounds_a_tensor_between_them_and_only_all_of_the_nearest() -> None:
    names = frozenset({"a", "b"})
    assert Touch(names).rounded({"a"})
    assert not Touch(names).rounded({"c"})
    assert not Touch(names, nearest=True).rounded({"a"})
    assert Touch(names, nearest=True).rounded({"a", "b"})
    assert not Touch(frozenset()).rounded({"a"})


@pytest.mark.parametrize("kind", [None, Plain])
def test_all_layers_alike_are_the_one_precision_of_a_network(kind: type | None) -> None:
    net = NET if kind is None else Network.of(trained(kind), X[:2])
    names = layers(editable(transforms["fold_batchnorm"](net)))
    mine = quantize_mixed(net, X, dict.fromkeys(names, INT8))
    theirs = quantize(net, X, reduce_range=False)
    assert mine.edges == theirs.edges
    for name, weight in theirs.weights.items():
        assert torch.equal(mine.weights[name].dense(), weight.dense())


def test_float_layers_keep_their_numbers_and_the_tensors_between_them() -> None:
    mix = quantize_mixed(NET, X, {NAMES[0]: INT4, NAMES[3]: Spec()})
    assert set(mix.weights) == {NAMES[0]}
    assert len(mix.edges) == 2  # the input and what the stem writes
    float_net = transforms["fold_batchnorm"](NET)
    for name in NAMES[1:]:
        theirs = float_net.module.state_dict()[name]
        assert torch.equal(mix.network.module.state_dict()[name], theirs)


def test_no_integer_layer_changes_nothing() -> None:
    mix = quantize_mixed(NET, X, dict.fromkeys(NAMES, Spec()))
    assert not mix.weights
    assert not mix.edges
    torch.testing.assert_close(Simulation(mix)(X), NET(X), rtol=1e-4, atol=1e-5)


def test_weights_alone_leave_all_tensors_float() -> None:
    mix = quantize_mixed(NET, X, dict.fromkeys(NAMES, Spec.parse("int4_channel_sym@gptq")))
    assert set(mix.weights) == set(NAMES)
    assert not mix.edges


def test_a_tensor_has_the_most_bits_that_are_asked_of_it() -> None:
    specs = {NAMES[1]: INT8, NAMES[2]: Spec.parse("int4_channel_sym+a4@gptq")}
    mix = quantize_mixed(NET, X, specs)
    graph = editable(transforms["fold_batchnorm"](NET))
    for name, edge in mix.edges.items():
        names = touching(graph)[name].names
        assert edge.bits == (8 if NAMES[1] in names else 4)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(WrongUse, match=r"`conv9.weight` cannot be quantized"):
        quantize_mixed(NET, X, {"conv9.weight": INT8})
    with pytest.raises(BadInput, match="no calibration data"):
        quantize_mixed(NET, X[:0], {NAMES[0]: INT8})
