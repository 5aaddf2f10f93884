import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lighten import divergence
from lighten.errors import BadOutput, WrongUse
from lighten.measure import Head, compare, quality


def heads(vocabulary=700, dim=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(vocabulary, dim, generator=g)
    return Head(w), Head(w + 0.1 * torch.randn(w.shape, generator=g))


def states(count, length, dim=16, seed=1):
    g = torch.Generator().manual_seed(seed)
    reference = torch.randn(count, length, dim, generator=g)
    return reference + 0.1 * torch.randn(reference.shape, generator=g), reference


def tokens(count, length, vocabulary=700, seed=2):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (count, length), generator=g)


def brute(hidden, head, reference, reference_head, targets):
    """Whole logits in float64."""

    def logits(h, head):
        z = (h.double() @ head.weight.double().T) * head.scale
        if head.bias is not None:
            z = z + head.scale * head.bias.double()
        return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)

    q = torch.log_softmax(logits(hidden, head), -1)
    p = torch.log_softmax(logits(reference, reference_head), -1)
    at = torch.arange(len(targets))
    kld = (p.exp() * (p - q)).sum(-1)
    return -q[at, targets], -p[at, targets], kld, q.argmax(-1) == p.argmax(-1)


@pytest.mark.parametrize("slices", [(512, 2**20, 2**22), (9, 1000, 1000), (41, 1, 1)])
@pytest.mark.parametrize("kind", ["plain", "bias", "softcap", "scale", "bfloat16", "other dim"])
def test_compare_equals_whole_logits(kind, slices, monkeypatch):
    monkeypatch.setattr(divergence, "_ROWS", slices[0])
    monkeypatch.setattr(divergence, "_LOGITS", slices[1])
    monkeypatch.setattr(divergence, "_WEIGHTS", slices[2])
    reference_head, head = heads()
    hidden, reference = (x[0] for x in states(1, 41))
    if kind == "bias":
        head = Head(head.weight, torch.randn(700))
    elif kind == "softcap":
        head, reference_head = (
            Head(head.weight, softcap=3.0),
            Head(reference_head.weight, None, 3.0),
        )
    elif kind == "scale":
        head = Head(head.weight, torch.randn(700), 5.0, 0.25)
    elif kind == "bfloat16":
        head, hidden = Head(head.weight.bfloat16()), hidden.bfloat16()
    elif kind == "other dim":
        head, hidden = Head(head.weight[:, :8]), hidden[:, :8]
    targets = tokens(1, 41)[0]
    found = compare(hidden, head, reference, reference_head, targets)
    nll, reference_nll, kld, same = brute(hidden, head, reference, reference_head, targets)
    torch.testing.assert_close(found.nll, nll, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.reference_nll, reference_nll, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.kld, kld, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.same_top1, same)
    assert same.float().mean() > 0


def test_large_logits_neither_overflow_nor_lose_the_divergence():
    reference_head, head = heads(dim=8)
    hidden, reference = (100 * x[0] for x in states(1, 20, dim=8))
    targets = tokens(1, 20)[0]
    found = compare(hidden, head, reference, reference_head, targets)
    nll, _, kld, _ = brute(hidden, head, reference, reference_head, targets)
    assert nll.max() > 200
    torch.testing.assert_close(found.nll, nll, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(found.kld, kld, atol=1e-3, rtol=1e-4)


def test_identical_models_differ_by_exactly_nothing():
    head, _ = heads(vocabulary=9000)
    windows = tokens(3, 20, 9000)
    _, h = states(3, 20)
    found = quality(h, head, h, head, windows)
    assert found.kld_mean.value == found.kld_mean.high == found.kld_p99.value == 0
    assert found.top1.value == found.top1.low == 1
    assert found.perplexity_ratio.value == found.perplexity_ratio.high == 1


class Largest(TorchDispatchMode):
    """The largest tensor, in bytes, that any operator returned as new memory."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not t._is_view():
                self.bytes = max(self.bytes, t.numel() * t.element_size())
        return out


def test_no_operator_makes_more_than_16_megabytes_of_a_large_vocabulary():
    w = torch.randn(150_000, 64).bfloat16()  # as float32: 38 MB; 600 positions of logits: 360 MB
    h = torch.randn(600, 64)
    with Largest() as largest:
        compare(h, Head(w), h, Head(w), torch.zeros(600, dtype=torch.long))
    assert 2**20 < largest.bytes <= 2**24


def test_quality_is_means_and_numpys_quantile_over_all_positions():
    reference_head, head = heads()
    hidden, reference = states(5, 33)
    windows = tokens(5, 33)
    found = quality(hidden, head, reference, reference_head, windows)
    parts = [
        brute(h[:-1], head, r[:-1], reference_head, w[1:])
        for h, r, w in zip(hidden, reference, windows, strict=True)
    ]
    nll, reference_nll, kld, same = (
        torch.cat(x).double().numpy() for x in zip(*parts, strict=True)
    )
    assert (found.windows, found.tokens) == (5, 160)
    assert found.perplexity.value == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    assert found.reference_perplexity.value == pytest.approx(np.exp(reference_nll.mean()), rel=1e-5)
    ratio = np.exp((nll - reference_nll).mean())
    assert found.perplexity_ratio.value == pytest.approx(ratio, rel=1e-5)
    assert found.kld_mean.value == pytest.approx(kld.mean(), rel=1e-4)
    assert found.kld_p99.value == pytest.approx(np.quantile(kld, 0.99), rel=1e-4)
    assert found.top1.value == pytest.approx(same.mean())
    for e in (found.perplexity, found.kld_mean, found.kld_p99, found.top1, found.perplexity_ratio):
        assert e.low < e.value < e.high


def test_order_of_windows_does_not_matter():
    reference_head, head = heads()
    hidden, reference = states(6, 12)
    windows, order = tokens(6, 12), torch.tensor([3, 1, 5, 0, 2, 4])
    one = quality(hidden, head, reference, reference_head, windows)
    other = quality(hidden[order], head, reference[order], reference_head, windows[order])
    for name in ("perplexity", "kld_mean", "kld_p99", "top1", "perplexity_ratio"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.value == pytest.approx(b.value, rel=1e-12)
        assert (a.low, a.high) == pytest.approx((b.low, b.high), rel=0.2)


def test_second_half_only_scores_what_llama_cpp_scores():
    reference_head, head = heads()
    hidden, reference = states(2, 16)
    windows = tokens(2, 16)
    found = quality(hidden, head, reference, reference_head, windows, second_half_only=True)
    kld = [
        brute(h[8:15], head, r[8:15], reference_head, w[9:16])[2]
        for h, r, w in zip(hidden, reference, windows, strict=True)
    ]
    assert found.tokens == 14
    assert found.kld_mean.value == pytest.approx(float(torch.cat(kld).mean()), rel=1e-4)


def test_without_a_reference_there_is_perplexity_only():
    head, _ = heads()
    h, _ = states(3, 12)
    found = quality(iter(h), head, None, None, tokens(3, 12))
    assert set(found.as_dict()) == {"windows", "tokens", "perplexity"}


def test_dict_is_flat_with_value_low_high():
    reference_head, head = heads()
    hidden, reference = states(3, 12)
    found = quality(hidden, head, reference, reference_head, tokens(3, 12)).as_dict()
    assert set(found) == {
        "windows",
        "tokens",
        "perplexity",
        "reference_perplexity",
        "perplexity_ratio",
        "mean_kld",
        "p99_kld",
        "top1_agreement",
    }
    for name in set(found) - {"windows", "tokens"}:
        assert set(found[name]) == {"value", "low", "high"}


@pytest.mark.parametrize("missing", ["model", "reference"])
@pytest.mark.parametrize("count", [1, 3])
def test_states_for_another_number_of_windows_are_refused(missing, count):
    head, _ = heads()
    h, _ = states(3, 12)
    given = {"model": h[:2], "reference": h[:2], missing: h[:count]}
    with pytest.raises(WrongUse, match=f"the {missing} gives hidden states of"):
        quality(iter(given["model"]), head, iter(given["reference"]), head, tokens(2, 12))


def test_wrong_shapes_and_vocabularies_are_refused_with_their_values():
    head, _ = heads()
    h, _ = states(1, 12)
    other, _ = heads(vocabulary=650)
    with pytest.raises(WrongUse, match="700 tokens, its reference 650"):
        quality(h, head, h, other, tokens(1, 12, 650))
    with pytest.raises(WrongUse, match=r"reach from .* to 700"):
        compare(h[0], head, None, None, torch.full((12,), 700))
    with pytest.raises(WrongUse, match="takes 16 channels, its states have 8"):
        compare(h[0, :, :8], head, None, None, tokens(1, 12)[0])
    with pytest.raises(WrongUse, match=r"gives \(5, 16\) for a window of 12"):
        quality(h[:, :5], head, None, None, tokens(1, 12))
    with pytest.raises(WrongUse, match="not \\(count, length\\)"):
        quality(h, head, None, None, tokens(1, 1))


@pytest.mark.parametrize("who", ["model", "reference"])
def test_not_finite_states_are_named(who):
    head, _ = heads()
    good, _ = states(1, 12)
    bad = good.clone()
    bad[0, 3] = float("nan")
    pair = (bad, good) if who == "model" else (good, bad)
    with pytest.raises(BadOutput, match=f"the {who} gives no finite logits at 1 of 11"):
        quality(pair[0], head, pair[1], head, tokens(1, 12))
