"""Operators that only move data: the same operator moves the labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lighten.coupling.labels import Labels, Value
from lighten.coupling.trace import Args, Trace, operator_name, rule

aten = torch.ops.aten

MOVES: dict[str, Callable[[Tensor, Args], Any]] = {
    "view": lambda x, a: x.reshape(a["out"].shape),
    "reshape": lambda x, a: x.reshape(a["out"].shape),
    "_unsafe_view": lambda x, a: x.reshape(a["out"].shape),
    "flatten": lambda x, a: x.reshape(a["out"].shape),
    "unflatten": lambda x, a: x.reshape(a["out"].shape),
    "view_as": lambda x, a: x.reshape(a["out"].shape),
    "reshape_as": lambda x, a: x.reshape(a["out"].shape),
    "unsqueeze": lambda x, a: x.unsqueeze(a["dim"]),
    "squeeze": lambda x, a: x.reshape(a["out"].shape),
    "permute": lambda x, a: x.permute(a["dims"]),
    "transpose": lambda x, a: x.transpose(a["dim0"], a["dim1"]),
    "swapaxes": lambda x, a: x.transpose(a["axis0"], a["axis1"]),
    "movedim": lambda x, a: x.movedim(a["source"], a["destination"]),
    "t": lambda x, a: x.t(),
    "numpy_T": lambda x, a: x.permute(*reversed(range(x.dim()))),
    "mT": lambda x, a: x.mT,
    "slice": lambda x, a: aten.slice(x, a["dim"], a["start"], a["end"], a["step"]),
    "narrow": lambda x, a: x.narrow(a["dim"], a["start"], a["length"]),
    "select": lambda x, a: x.select(a["dim"], a["index"]),
    "expand": lambda x, a: x.expand(a["out"].shape),
    "expand_as": lambda x, a: x.expand(a["out"].shape),
    "broadcast_to": lambda x, a: x.expand(a["out"].shape),
    "repeat": lambda x, a: x.repeat(a["repeats"]),
    "tile": lambda x, a: x.tile(a["dims"]),
    "flip": lambda x, a: x.flip(a["dims"]),
    "chunk": lambda x, a: x.chunk(a["chunks"], a["dim"]),
    "split": lambda x, a: aten.split(x, a.get("split_size", a.get("split_sizes")), a["dim"]),
    "split_with_sizes": lambda x, a: aten.split_with_sizes(x, a["split_sizes"], a["dim"]),
    "tensor_split": lambda x, a: x.tensor_split(a.get("sections", a.get("indices")), a["dim"]),
    "unbind": lambda x, a: x.unbind(a["dim"]),
    "pixel_shuffle": lambda x, a: torch.pixel_shuffle(x, a["upscale_factor"]),
    "pixel_unshuffle": lambda x, a: torch.pixel_unshuffle(x, a["downscale_factor"]),
    "channel_shuffle": lambda x, a: _channel_shuffle(x, a["groups"]),
}
_KEEP = (
    "contiguous", "clone", "detach", "alias", "lift_fresh_copy", "to", "_to_copy", "dropout",
    "feature_dropout", "alpha_dropout", "type_as", "_assert_tensor_metadata", "positive",
    "_conj", "real", "identity", "float", "requires_grad",
)  # fmt: skip


def _channel_shuffle(x: Tensor, groups: int) -> Tensor:
    rest = x.shape[2:]
    return x.reshape(len(x), groups, -1, *rest).transpose(1, 2).reshape(x.shape)


def source(a: Args) -> Value:
    """The operator's first tensor."""
    return next(v for v in a.values() if isinstance(v, Value))


def full(x: Labels, shape: tuple[int, ...]) -> Tensor:
    return x.ids.expand(shape)


@rule(*MOVES)
def move(t: Trace, a: Args) -> Any:
    x = source(a)
    function = MOVES[_name(t)]
    labels = [_movable(t, a, x, y) for y in x.labels]
    if len(labels) > 1 and _name(t) in _MERGES:
        labels = _unmerged(t, labels, x.shape, tuple(a["out"].shape))
    moved = [(y.zero, function(full(y, x.shape), a)) for y in labels]
    if not isinstance(a["out"], Tensor):
        outs = range(len(a["out"]))
        return [Value((), tuple(Labels.compact(m[i], z) for z, m in moved)) for i in outs]
    return Value((), tuple(Labels.compact(m, z) for z, m in moved))


def _name(t: Trace) -> str:
    return operator_name(t.node) if t.node is not None else ""


def _movable(t: Trace, a: Args, x: Value, y: Labels) -> Labels:
    """What a move does not allow to shrink is tied or locked first."""
    name = _name(t)
    if name == "select" and y.varies == {a["dim"] % len(x.shape)}:
        chosen = y.ids.select(a["dim"], a["index"])
        t.classes.lock(chosen, f"chosen by its position in {t.where}")
    if name == "slice" and a["step"] not in (None, 1):
        return _whole(t, y, {a["dim"] % len(x.shape)})
    if name == "pixel_unshuffle":
        return _whole(t, y, {len(x.shape) - 1, len(x.shape) - 2})
    return y


_MERGES = ("view", "reshape", "_unsafe_view", "flatten", "view_as", "reshape_as")


def _unmerged(
    t: Trace, labels: list[Labels], old: tuple[int, ...], new: tuple[int, ...]
) -> list[Labels]:
    """Where a reshape makes one dimension of several that have channels of their own, those of the
    first can go (whole heads) and the others stay."""
    kept: list[Labels] = []
    taken: set[int] = set()
    for y in sorted(labels, key=lambda y: min(y.varies)):
        spots = Labels.compact(y.ids.expand(old).reshape(new)).varies
        if spots & taken:
            t.lock(y, f"merged with other channels in {t.where}")
        else:
            taken |= spots
            kept.append(y)
    return kept


def _whole(t: Trace, y: Labels, dims: set[int]) -> Labels:
    return t.tie(y, dims, f"{t.where} needs the whole dimension")


@rule(*_KEEP)
def same(t: Trace, a: Args) -> Any:
    return Value((), source(a).labels)


@rule("roll", "im2col", "unfold", "cumsum", "cumprod")
def along_a_dimension(t: Trace, a: Args) -> Any:
    """Positions move by amounts that do not shrink with the dimension."""
    x = source(a)
    dims = a.get("dims", a.get("dim", a.get("dimension")))
    if dims is None or dims == []:
        spots = set(range(len(x.shape)))
    else:
        spots = {d % len(x.shape) for d in ([dims] if isinstance(dims, int) else dims)}
    labels = [_whole(t, y, spots) for y in x.labels]
    zero = _name(t) in ("roll", "unfold")
    rank = a["out"].dim()
    return Value((), tuple(Labels(_deepen(y.ids, rank), y.zero and zero) for y in labels))


def _deepen(ids: Tensor, rank: int) -> Tensor:
    return ids[(..., *[None] * (rank - ids.dim()))]


@rule("cat", "concat", "concatenate")
def cat(t: Trace, a: Args) -> Any:
    parts: list[Value] = [v for v in a["tensors"] if v.shape != (0,)]
    shape = tuple(a["out"].shape)
    dim = a["dim"] % len(shape)
    across = [[Labels(x.ids, x.zero) for x in v.labels if dim not in x.varies] for v in parts]
    out = list(_covered(t, across, parts, dim))
    along = [[x for x in v.labels if dim in x.varies] for v in parts]
    if not any(along):
        return Value((), tuple(out))
    # one label tensor with the parts' labels one after the other, 0 where a part has none
    layers = max(len(x) for x in along)
    for layer in range(layers):
        pieces, zero = [], True
        for v, found in zip(parts, along, strict=True):
            if layer < len(found):
                pieces.append(full(found[layer], v.shape))
                zero = zero and found[layer].zero
            else:
                pieces.append(torch.zeros((), dtype=torch.int64).expand(v.shape))
        out.append(Labels.compact(torch.cat(pieces, dim), zero))
    return Value((), tuple(out))


def _covered(t: Trace, across: list[list[Labels]], parts: list[Value], dim: int) -> list[Labels]:
    """Labels along other dimensions than the one that is joined: the same in all parts."""
    for k, v in enumerate(parts):
        for x in across[k]:
            for d in x.varies:
                bare = [w for w in parts if w is not v and not w.along(d)]
                if bare and any(w.shape[d] > 1 for w in bare):
                    x = t.tie(x, {d}, f"joined with what cannot shrink in {t.where}")
    return [Labels(x.ids, x.zero and len(parts) == 1) for x in t.meet(across)]


@rule("stack")
def stack(t: Trace, a: Args) -> Any:
    parts: list[Value] = list(a["tensors"])
    dim = a["dim"] % a["out"].dim()
    layers = max(len(v.labels) for v in parts)
    out = []
    for layer in range(layers):
        pieces, zero = [], True
        for v in parts:
            if layer < len(v.labels):
                pieces.append(full(v.labels[layer], v.shape))
                zero = zero and v.labels[layer].zero
            else:
                pieces.append(torch.zeros((), dtype=torch.int64).expand(v.shape))
        out.append(Labels.compact(torch.stack(pieces, dim), zero))
    return Value((), tuple(out))


@rule("repeat_interleave")
def repeat_interleave(t: Trace, a: Args) -> Any:
    x = source(a)
    if not isinstance(a["repeats"], int):
        t.lock(x.labels, f"{t.where} repeats by values")
        return None
    dim, n = a["dim"], a["repeats"]
    if dim is None:
        t.lock(x.labels, f"{t.where} flattens")
        return None
    moved = (Labels(y.ids.repeat_interleave(n if dim % len(x.shape) in y.varies else 1, dim),
                    y.zero) for y in x.labels)  # fmt: skip
    return Value((), tuple(moved))


@rule("pad", "constant_pad_nd")
def pad(t: Trace, a: Args) -> Any:
    """Padded positions are channels too: they go when what they are added to goes."""
    x = source(a)
    amounts = list(a["pad"])
    constant = a.get("mode", "constant") == "constant"
    zero = constant and not a["value"]
    labels = list(x.labels)
    for i in range(len(amounts) // 2):
        dim = len(x.shape) - 1 - i
        before, after = amounts[2 * i], amounts[2 * i + 1]
        if not before and not after:
            continue
        found = [y for y in labels if dim in y.varies]
        if not constant or before < 0 or after < 0:
            labels = [_whole(t, y, {dim}) for y in labels]
            continue
        grown = [_padded(t, y, dim, before, after, zero) for y in found]
        rest = [Labels(y.ids, y.zero and zero) for y in labels if dim not in y.varies]
        labels = rest + grown
    return Value((), tuple(labels))


def _padded(t: Trace, y: Labels, dim: int, before: int, after: int, zero: bool) -> Labels:
    pieces = []
    for n in (before, after):
        shape = [1] * y.ids.dim()
        shape[dim] = n
        pieces.append(t.classes.fresh(n).view(shape).expand(
            [n if d == dim else s for d, s in enumerate(y.ids.shape)]))  # fmt: skip
    return Labels(torch.cat([pieces[0], y.ids, pieces[1]], dim), y.zero and zero)


@rule("index_select", "index")
def index(t: Trace, a: Args) -> Any:
    """Chosen by values that the graph holds or computes: that dimension stays whole."""
    x = source(a)
    if "index" in a:
        dims = {a["dim"] % len(x.shape)}
        labels = [_whole(t, y, dims) for y in x.labels]
        return Value((), tuple(labels))
    given = list(a["indices"])
    used = [d for d, i in enumerate(given) if i is not None]
    labels = [_whole(t, y, set(used)) for y in x.labels]
    if len(used) != 1:
        t.lock(labels, f"{t.where} chooses along several dimensions")
        return None
    extra = len(given[used[0]].shape) - 1
    return Value((), tuple(Labels(_widen(y.ids, used[0], extra), y.zero) for y in labels))


def _widen(ids: Tensor, dim: int, extra: int) -> Tensor:
    shape = list(ids.shape)
    if extra < 0:
        return ids.reshape(shape[:dim] + shape[dim + 1 :])
    return ids.reshape(shape[: dim + 1] + [1] * extra + shape[dim + 1 :])


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "rand", "randn")
def create(t: Trace, a: Args) -> Any:
    """Its sizes follow whatever it meets."""
    return Value((), t.fresh(tuple(a["out"].shape), zero=_name(t).endswith("zeros")))


@rule("zeros_like", "ones_like", "full_like", "empty_like")
def create_like(t: Trace, a: Args) -> Any:
    zero = _name(t) == "zeros_like"
    return Value((), tuple(Labels(x.ids, zero) for x in source(a).labels))
