"""Operators that compute element by element, activations, reductions, softmax and pooling."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lighten.coupling.labels import Labels, Value
from lighten.coupling.moves import source
from lighten.coupling.trace import Args, Trace, leaves, rule

# f(0) = 0
_ODD = (
    "relu", "relu6", "leaky_relu", "gelu", "silu", "tanh", "hardtanh", "hardswish", "elu", "celu",
    "selu", "mish", "neg", "abs", "sqrt", "sign", "square", "sin", "softsign", "tan", "erf",
    "round", "floor", "ceil", "trunc", "expm1", "log1p", "clamp_max", "threshold", "prelu_kernel",
    "hardshrink", "softshrink", "tanhshrink", "asinh", "nan_to_num", "relu_",
)  # fmt: skip
_OTHER = (
    "sigmoid", "hardsigmoid", "exp", "log", "rsqrt", "reciprocal", "cos", "softplus", "log_sigmoid",
    "clamp", "clamp_min", "logical_not", "bitwise_not", "isnan", "isinf", "isfinite", "log2",
    "exp2", "log10", "acos", "logit", "digamma",
)  # fmt: skip
_ALL_ZERO = ("add", "sub", "rsub", "maximum", "minimum", "where", "lerp", "fmod", "remainder")
_ANY_ZERO = ("mul", "multiply")
_NO_ZERO = (
    "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "bitwise_and",
    "bitwise_or", "masked_fill", "atan2", "clamp_tensor", "addcmul", "addcdiv", "__and__", "__or__",
)  # fmt: skip


@rule(*_ODD)
def keeps_zero(t: Trace, a: Args) -> Any:
    return Value((), source(a).labels)


@rule(*_OTHER)
def moves_zero(t: Trace, a: Args) -> Any:
    return Value((), tuple(Labels(x.ids) for x in source(a).labels))


@rule("pow")
def power(t: Trace, a: Args) -> Any:
    exponent = a.get("exponent")
    if isinstance(exponent, int | float) and exponent > 0:
        return keeps_zero(t, a)
    if isinstance(a.get("self"), Value) and isinstance(exponent, int | float):
        t.divisors.extend(x.ids for x in source(a).labels if source(a).stored)
        return moves_zero(t, a)
    return no_zero(t, a)


@rule(*_ALL_ZERO)
def all_zero(t: Trace, a: Args) -> Any:
    return combine(t, a, lambda states, n: len(states) == n and all(states))


@rule(*_ANY_ZERO)
def any_zero(t: Trace, a: Args) -> Any:
    return combine(t, a, lambda states, n: any(states))


@rule(*_NO_ZERO)
def no_zero(t: Trace, a: Args) -> Any:
    return combine(t, a, lambda states, n: False)


@rule("div", "divide", "true_divide", "floor_divide")
def divide(t: Trace, a: Args) -> Any:
    other = a["other"]
    if isinstance(other, Value):
        t.divisors.extend(x.ids for x in other.labels)
    top = a["self"].labels if isinstance(a["self"], Value) else ()
    value = combine(t, a, lambda states, n: True)
    rank = len(a["out"].shape)
    zeros = [x.leading(rank).varies for x in top if x.zero]
    labels = (Labels(x.ids, any(x.varies & z for z in zeros)) for x in value.labels)
    return Value((), tuple(labels))


def combine(t: Trace, a: Args, zero: Any) -> Value:
    """Elementwise on everything that is a tensor. zero: of the states of those that have the
    label and the number of operands, whether the result is zero where the channel is gone."""
    given = leaves({k: v for k, v in a.items() if k != "out"})
    scalars = sum(
        isinstance(v, int | float) and not isinstance(v, bool) and k in ("self", "other")
        for k, v in a.items()
    )
    shape = tuple(a["out"].shape)
    return pointwise(t, given, shape, zero, scalars)


def pointwise(
    t: Trace, given: list[Value], shape: tuple[int, ...], zero: Any, scalars: int
) -> Value:
    rank = len(shape)
    groups = [[x.leading(rank) for x in v.labels] for v in given]
    sizes = [(1,) * (rank - len(v.shape)) + v.shape for v in given]
    for k, group in enumerate(groups):
        for i, x in enumerate(group):
            group[i] = _facing(t, x, k, groups, sizes)
        if any(not v.stored for v in given):
            for x in given[k].labels:
                t.role(given[k], x, "carries")
    out = []
    for x in t.meet(groups):
        states = [y.zero for group in groups for y in group if y.varies & x.varies]
        out.append(Labels(x.ids, bool(zero(states, len(given) + scalars))))
    return Value((), tuple(out))


def _facing(
    t: Trace, x: Labels, k: int, groups: list[list[Labels]], sizes: list[tuple[int, ...]]
) -> Labels:
    """x, tied along dimensions where another operand is as long and has no channels."""
    bare = {
        d
        for d in x.varies
        for j, size in enumerate(sizes)
        if j != k and size[d] > 1 and not any(d in y.varies for y in groups[j])
    }
    return t.tie(x, bare, f"meets what cannot shrink in {t.where}") if bare else x


@rule("prelu", "_prelu_kernel")
def prelu(t: Trace, a: Args) -> Any:
    x, w = a["self"], a["weight"]
    channel = 1 if len(x.shape) > 1 else 0
    spread = Value(
        tuple(w.shape[0] if d == channel else 1 for d in range(len(x.shape))),
        tuple(Labels(_spread(y, channel, len(x.shape)).ids, y.zero) for y in w.labels),
        w.stored,
    )
    if len(w.shape) != 1:
        spread = w
    for y in w.labels:
        t.role(w, y, "carries")
    return pointwise(t, [x, spread], x.shape, lambda states, n: True, 0)


def _spread(x: Labels, dim: int, rank: int) -> Labels:
    """Labels of a vector along one dimension of a tensor."""
    return Labels(x.ids.reshape([-1 if d == dim else 1 for d in range(rank)]), x.zero)


def dims_of(dims: Any, rank: int) -> set[int]:
    if dims is None or dims == []:
        return set(range(rank))
    return {d % rank for d in ([dims] if isinstance(dims, int) else dims)}


def reduce(
    t: Trace, x: Value, dims: set[int], keep: bool, why: str, plain_sum: bool = False
) -> tuple[Labels, ...]:
    """Labels after a reduction over dims: what varies along them is whole or locked."""
    out = []
    for y in x.labels:
        if plain_sum and y.zero and y.varies <= dims:
            continue
        y = t.tie(y, dims, why)
        ids = (
            y.ids
            if keep
            else y.ids.reshape([s for d, s in enumerate(y.ids.shape) if d not in dims])
        )
        out.append(Labels(ids, y.zero))
    return tuple(out)


@rule("mean", "amax", "amin", "max", "min", "var", "std", "norm", "logsumexp", "prod", "argmax",
      "argmin", "all", "any", "linalg_vector_norm", "var_mean", "median")  # fmt: skip
def statistic(t: Trace, a: Args) -> Any:
    x = source(a)
    if isinstance(a.get("other"), Value):
        return no_zero(t, a)
    dims = dims_of(a.get("dim"), len(x.shape))
    keep = bool(a.get("keepdim", False))
    labels = reduce(t, x, dims, keep, f"{t.where} is taken over these channels")
    if isinstance(a["out"], list | tuple):
        return [Value((), labels) for _ in a["out"]]
    return Value((), labels)


@rule("sum")
def total(t: Trace, a: Args) -> Any:
    x = source(a)
    dims = dims_of(a.get("dim"), len(x.shape))
    keep = bool(a.get("keepdim", False))
    return Value((), reduce(t, x, dims, keep, f"{t.where} is taken over these channels", True))


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def softmax(t: Trace, a: Args) -> Any:
    x = source(a)
    labels = _whole(t, x, {a["dim"] % len(x.shape)})
    return Value((), tuple(Labels(y.ids) for y in labels))


@rule("glu")
def glu(t: Trace, a: Args) -> Any:
    x = source(a)
    dim = a["dim"] % len(x.shape)
    out = []
    for y in x.labels:
        if dim in y.varies:
            first, second = y.ids.chunk(2, dim)
            t.unite(first, second)
            y = Labels.compact(first, y.zero)
        out.append(y)
    return Value((), tuple(out))


def _whole(t: Trace, x: Value, dims: Iterable[int]) -> list[Labels]:
    return [t.tie(y, dims, f"{t.where} is taken over these channels") for y in x.labels]


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
      "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
      "adaptive_max_pool2d", "adaptive_max_pool3d", "max_pool2d_with_indices", "lp_pool2d",
      "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
      "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
      "_upsample_nearest_exact2d", "reflection_pad1d", "reflection_pad2d", "replication_pad1d",
      "replication_pad2d", "_adaptive_avg_pool2d")  # fmt: skip
def over_places(t: Trace, a: Args) -> Any:
    """Works within a channel, on all of its places."""
    x = source(a)
    out = a["out"][0] if isinstance(a["out"], list | tuple) else a["out"]
    name = t.node.target.__name__ if t.node is not None else ""  # type: ignore[union-attr]
    width = next((n for n in (1, 2, 3) if f"{n}d" in name), 2)
    places = range(len(out.shape) - width, len(out.shape))
    labels = _whole(t, x, places)
    if isinstance(a["out"], list | tuple):
        return [Value((), tuple(labels)) for _ in a["out"]]
    return Value((), tuple(labels))
