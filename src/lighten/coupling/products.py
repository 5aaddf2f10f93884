"""Operators that multiply and sum: linear, convolution, matmul, einsum, attention, embedding."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from lighten.coupling.labels import Labels, Value
from lighten.coupling.pointwise import pointwise
from lighten.coupling.trace import Args, Trace, rule

Letters = Sequence[Hashable]


def contract(t: Trace, operands: list[tuple[Value, Letters]], out: Letters) -> Value:
    """Labels of an einsum.

    What is summed over must go from all operands at once, and be zero in one of them once zeroed;
    labels that span a summed dimension and another one (heads x head size) become whole units.
    """
    frame = list(dict.fromkeys([*out, *(c for _, letters in operands for c in letters)]))
    spot = {c: i for i, c in enumerate(frame)}
    summed = {spot[c] for c in frame if c not in set(out)}
    sizes = [{spot[c]: n for c, n in zip(letters, v.shape, strict=True)} for v, letters in operands]
    groups = [
        [_aligned(x, [spot[c] for c in letters], len(frame)) for x in v.labels]
        for v, letters in operands
    ]
    heads = None if any(v.stored for v, _ in operands) else "heads"
    for (v, _), group in zip(operands, groups, strict=True):
        for i, x in enumerate(group):
            if not all(w.stored for w, _ in operands):
                t.role(v, x, "reads" if x.varies & summed else "writes")
            if x.varies & summed and x.varies - summed:
                x = t.tie(x, summed, f"summed over in {t.where}", heads)
            group[i] = x
    for k, group in enumerate(groups):
        for i, x in enumerate(group):
            group[i] = _facing(t, x, k, groups, sizes, summed)
    readers = [v.stored for v, _ in operands]
    found = t.meet(groups)
    for x in found:
        if x.varies & summed and not any(readers) and not x.zero:
            t.tie(x, summed, f"summed over in {t.where} where a removed channel is not zero")
    kept = [x.first(summed) for x in found if not x.varies <= summed]
    return Value((), tuple(Labels(_leading(x.ids, len(out)), x.zero) for x in kept))


def _aligned(x: Labels, spots: list[int], rank: int) -> Labels:
    """The labels of an operand in the frame of all letters."""
    order = sorted(range(len(spots)), key=lambda i: spots[i])
    ids = x.ids.permute(order)
    shape = [1] * rank
    for i, size in zip(order, ids.shape, strict=True):
        shape[spots[i]] = size
    return Labels(ids.reshape(shape), x.zero)


def _leading(ids: Tensor, rank: int) -> Tensor:
    return ids.reshape(ids.shape[:rank])


def _facing(
    t: Trace, x: Labels, k: int, groups: list[list[Labels]], sizes: list[dict[int, int]],
    summed: set[int],
) -> Labels:  # fmt: skip
    """x, tied along dimensions on which another operand has no channels to give."""
    bare = set()
    for d in x.varies:
        others = [j for j, size in enumerate(sizes) if j != k and size.get(d, 1) > 1]
        if any(not any(d in y.varies for y in groups[j]) for j in others):
            bare.add(d)
        if d in summed and not others and not x.zero:
            bare.add(d)
    return t.tie(x, bare, f"meets what cannot shrink in {t.where}") if bare else x


def with_bias(t: Trace, x: Value, bias: Any, dim: int, rank: int) -> Value:
    """x plus one number for each position along dim."""
    if not isinstance(bias, Value):
        return x
    out: list[Labels] = []
    for y in bias.labels:
        t.role(bias, y, "carries")
    spread = [
        Labels(y.ids.reshape([-1 if d == dim else 1 for d in range(rank)])) for y in bias.labels
    ]
    for y in spread:
        if not x.along(dim):
            t.lock(y, f"added to what cannot shrink in {t.where}")
    for x_labels in x.labels:
        if dim in x_labels.varies:
            if not spread:
                t.tie(x_labels, {dim}, f"meets what cannot shrink in {t.where}")
            merged = t.meet([[x_labels], spread])
            out.extend(Labels(m.ids, x_labels.zero) for m in merged)
        else:
            out.append(Labels(x_labels.ids))
    return Value(x.shape, tuple(out))


@rule("linear")
def linear(t: Trace, a: Args) -> Any:
    x, w = a["input"], a["weight"]
    rank = len(x.shape)
    batch = [f"b{i}" for i in range(rank - 1)]
    y = contract(t, [(x, [*batch, "i"]), (w, ["o", "i"])], [*batch, "o"])
    return with_bias(t, y, a["bias"], rank - 1, rank)


@rule("addmm")
def addmm(t: Trace, a: Args) -> Any:
    y = contract(t, [(a["mat1"], "bi"), (a["mat2"], "io")], "bo")
    return with_bias(t, y, a["self"], 1, 2) if len(a["self"].shape) == 1 else _added(t, a, y)


@rule("baddbmm")
def baddbmm(t: Trace, a: Args) -> Any:
    return _added(t, a, contract(t, [(a["batch1"], "bmk"), (a["batch2"], "bkn")], "bmn"))


def _added(t: Trace, a: Args, product: Value) -> Value:
    """A product plus a whole tensor."""
    shape = tuple(a["out"].shape)
    product = Value(shape, tuple(x for x in product.labels if x.varies))
    return pointwise(
        t, [a["self"], product], shape, lambda states, n: len(states) == n and all(states), 0
    )


@rule("matmul", "mm", "bmm")
def matmul(t: Trace, a: Args) -> Any:
    x = a["self"]
    y = a["mat2"] if "mat2" in a else a["other"]
    n = max(len(x.shape), len(y.shape)) - 2
    batch = [f"b{i}" for i in range(max(n, 0))]
    left = [*batch[max(n, 0) - (len(x.shape) - 2) :], "m", "k"] if len(x.shape) > 1 else ["k"]
    right = [*batch[max(n, 0) - (len(y.shape) - 2) :], "k", "n"] if len(y.shape) > 1 else ["k"]
    out = [*batch, *(["m"] if len(x.shape) > 1 else []), *(["n"] if len(y.shape) > 1 else [])]
    return contract(t, [(x, left), (y, right)], out)


@rule("einsum")
def einsum(t: Trace, a: Args) -> Any:
    equation = a["equation"].replace(" ", "")
    tensors: list[Value] = list(a["tensors"])
    if "..." in equation:
        equation = _spelled(equation, [len(v.shape) for v in tensors])
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        letters = left.replace(",", "")
        out = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    if any(len(set(term)) < len(term) for term in terms):
        t.lock([x for v in tensors for x in v.labels], f"{t.where} takes a diagonal")
        return None
    return contract(t, list(zip(tensors, terms, strict=True)), out)


def _spelled(equation: str, ranks: list[int]) -> str:
    """An equation with its ellipses spelled out."""
    left, arrow, out = equation.partition("->")
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    widths = [r - (len(s) - 3) for s, r in zip(left.split(","), ranks, strict=True) if "..." in s]
    names = "".join(free[: max(widths)])
    terms = []
    for term, rank in zip(left.split(","), ranks, strict=True):
        own = rank - (len(term) - 3)
        terms.append(term.replace("...", names[len(names) - own :]) if "..." in term else term)
    return ",".join(terms) + arrow + out.replace("...", names)


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d",
      "conv_transpose3d")  # fmt: skip
def convolution(t: Trace, a: Args) -> Any:
    x, w, groups = a["input"], a["weight"], a["groups"]
    name = t.node.target.__name__ if t.node is not None else ""  # type: ignore[union-attr]
    flipped = bool(a.get("transposed", "transpose" in name))
    rank = len(x.shape)
    places = range(rank - (len(w.shape) - 2), rank)
    c = places[0] - 1
    for y in w.labels:
        if min(y.varies) > 1:
            t.lock(y, "a place of a convolution's kernel")
    inputs = [t.tie(y, places, f"places of an image in {t.where}") for y in x.labels]
    x = Value((*x.shape[: c + 1], *[1] * len(places)), tuple(inputs), x.stored)
    ways = [y for y in w.labels if min(y.varies) < 2]
    flat = Value(w.shape[:2], tuple(Labels(_leading(y.first(y.varies - {0, 1}).ids, 2), y.zero)
                                    for y in ways), w.stored)  # fmt: skip
    if groups == 1:
        letters = ["i", "o"] if flipped else ["o", "i"]
        batch = [f"b{d}" for d in range(c)]
        spots = [f"s{d}" for d in places]
        y = contract(t, [(x, [*batch, "i", *spots]), (flat, letters)], [*batch, "o", *spots])
    else:
        y = _grouped(t, x, flat, groups, c, flipped)
    return with_bias(t, y, a["bias"], c, rank)


def _grouped(t: Trace, x: Value, w: Value, groups: int, c: int, flipped: bool) -> Value:
    """Depthwise: an input channel with the outputs made of it. Else: channel j of every group."""
    rank = len(x.shape)
    ins = 0 if flipped else 1
    per_in = w.shape[0] // groups if flipped else w.shape[1]
    write = w.along(0)[0].ids[:, 0] if w.along(0) else None  # (out,) or, flipped, (in,)
    other = w.along(1)[0].ids[0] if w.along(1) else None
    source = x.along(c)
    rest = [y for y in x.labels if c not in y.varies]
    if write is None:
        t.lock(source, f"{t.where} has weights that cannot shrink")
        return Value((), tuple(rest))
    own = t.tie(source[0], source[0].varies - {c}, f"channels in {t.where}").ids if source else None
    if own is not None:
        own = own.reshape(-1)
        for extra in source[1:]:
            t.tie(extra, extra.varies - {c}, f"channels in {t.where}")
    if per_in == 1 and not flipped:
        many = len(write) // groups
        if own is None:
            t.classes.lock(write, f"reads what cannot shrink in {t.where}")
        else:
            t.unite(own.repeat_interleave(many), write)
        for y in w.labels:
            t.role(w, y, "carries")
        labels: Tensor | None = write
    else:
        reads, writes = (write, other) if flipped else (other, write)
        if reads is not None:
            by_group = reads.reshape(groups, -1) if flipped else reads.reshape(1, -1)
            _every_group(t, by_group)
            if own is None:
                t.classes.lock(reads, f"reads what cannot shrink in {t.where}")
        if own is not None:
            mine = own.reshape(groups, -1)
            _every_group(t, mine)
            if reads is None:
                t.classes.lock(own, f"one channel in each group of {t.where}")
            else:
                t.unite(mine[0], reads.reshape(-1)[: mine.shape[1]])
        if writes is not None and not flipped:
            _every_group(t, writes.reshape(groups, -1))
        for y in w.labels:
            t.role(w, y, "reads" if y.varies == {ins} else "writes")
        labels = writes if not flipped else None if writes is None else writes.repeat(groups)
    if labels is None:
        return Value((), tuple(rest))
    shape = [-1 if d == c else 1 for d in range(rank)]
    return Value((), (*rest, Labels(labels.reshape(shape), zero=True)))


def _every_group(t: Trace, ids: Tensor) -> None:
    """ids: (groups, channels): channel j of all groups is one unit, so that groups stay alike."""
    if ids.shape[0] > 1:
        t.unite(ids[1:], ids[:1])
        t.marks.setdefault("groups", []).append(ids[0])


@rule("embedding")
def embedding(t: Trace, a: Args) -> Any:
    w, index = a["weight"], a["indices"]
    rank = len(index.shape) + 1
    out = []
    for y in w.labels:
        if 0 in y.varies:
            t.tie(y, {0}, "rows of a table that is looked up")
        else:
            t.role(w, y, "writes")
            out.append(Labels(y.ids.reshape((1,) * (rank - 1) + (-1,)), y.zero))
    return Value((), tuple(out))


@rule("scaled_dot_product_attention")
def attention(t: Trace, a: Args) -> Any:
    """softmax(q kᵀ) v: a query head goes with its key and value heads."""
    q, k, v = a["query"], a["key"], a["value"]
    rank = len(q.shape)
    if rank > 2 and k.shape[-3] != q.shape[-3]:
        k, v = (_shared_heads(x, q.shape[-3]) for x in (k, v))
    batch = [f"b{i}" for i in range(rank - 2)]
    scores = contract(t, [(q, [*batch, "t", "d"]), (k, [*batch, "s", "d"])], [*batch, "t", "s"])
    shape = (*q.shape[:-1], k.shape[-2])
    scores = Value(shape, tuple(x for x in scores.labels if x.varies))
    mask = a["attn_mask"]
    if isinstance(mask, Value):
        scores = Value(shape, pointwise(t, [scores, mask], shape, lambda s, n: False, 0).labels)
    weights = [t.tie(x, {rank - 1}, "attention weights sum to one") for x in scores.labels]
    soft = Value(shape, tuple(Labels(x.ids) for x in weights if x.varies))
    values = [
        t.tie(x, {rank - 1}, "values of a head", "heads") if x.varies - {rank - 1} else x
        for x in v.labels
    ]
    v = Value(v.shape, tuple(values))
    return contract(t, [(soft, [*batch, "t", "s"]), (v, [*batch, "s", "e"])], [*batch, "t", "e"])


def _shared_heads(x: Value, heads: int) -> Value:
    """Keys or values (..., kv heads, time, size) as every query head sees them."""
    n = heads // x.shape[-3]
    labels = []
    for y in x.labels:
        many = n if len(x.shape) - 3 in y.varies else 1
        labels.append(Labels(y.ids.repeat_interleave(many, -3), y.zero))
    return Value((*x.shape[:-3], heads, *x.shape[-2:]), tuple(labels), x.stored)
