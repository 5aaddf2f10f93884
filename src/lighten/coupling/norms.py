"""Normalisations: which of them a channel can leave without changing the others."""

from __future__ import annotations

from typing import Any

from lighten.coupling.labels import Labels, Value
from lighten.coupling.pointwise import pointwise
from lighten.coupling.trace import Args, Trace, rule


def _affine(t: Trace, x: Value, stored: list[Any], zero: bool) -> Value:
    """Labels of x (batch, channels, ...) joined with those of vectors over its channels."""
    rank = len(x.shape)
    vectors = []
    for v in stored:
        if isinstance(v, Value):
            for y in v.labels:
                t.role(v, y, "carries")
            shape = tuple(v.shape[0] if d == 1 else 1 for d in range(rank))
            spread = tuple(Labels(y.ids.reshape([-1 if d == 1 else 1 for d in range(rank)]))
                           for y in v.labels)  # fmt: skip
            vectors.append(Value(shape, spread, True))
    return pointwise(t, [x, *vectors], x.shape, lambda states, n: zero, 0)


@rule("batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit",
      "native_batch_norm")  # fmt: skip
def batch_norm(t: Trace, a: Args) -> Any:
    stored = [a.get(k) for k in ("weight", "bias", "running_mean", "running_var")]
    x = a["input"]
    y = _affine(t, x, stored, isinstance(a.get("weight"), Value))
    return y if not isinstance(a["out"], list | tuple) else [y, *[None] * (len(a["out"]) - 1)]


@rule("instance_norm")
def instance_norm(t: Trace, a: Args) -> Any:
    x = a["input"]
    places = range(2, len(x.shape))
    labels = tuple(t.tie(y, places, f"{t.where} is taken over these") for y in x.labels)
    stored = [a.get(k) for k in ("weight", "bias", "running_mean", "running_var")]
    return _affine(t, Value(x.shape, labels), stored, isinstance(a.get("weight"), Value))


@rule("group_norm", "native_group_norm")
def group_norm(t: Trace, a: Args) -> Any:
    """A group of the norm is one unit: the statistics of the others do not change."""
    x = a["input"]
    groups = a["num_groups"] if "num_groups" in a else a["group"]
    places = range(2, len(x.shape))
    labels = []
    for y in x.labels:
        y = t.tie(y, places, f"{t.where} is taken over these")
        if 1 in y.varies:
            y = t.tie(y, y.varies - {1}, f"channels in {t.where}")
            ids = y.ids.reshape(groups, -1)
            if groups == 1:
                t.lock(y, f"{t.where} is taken over all of these channels")
            elif ids.shape[1] > 1:
                t.unite(ids[:, 1:], ids[:, :1])
                t.marks.setdefault("groups", []).append(ids[:, 0])
        labels.append(y)
    out = _affine(t, Value(x.shape, tuple(labels)), [a["weight"], a["bias"]],
                isinstance(a["weight"], Value))  # fmt: skip
    return out if not isinstance(a["out"], list | tuple) else [out, None, None]


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(t: Trace, a: Args) -> Any:
    x = a["input"]
    rank = len(x.shape)
    dims = set(range(rank - len(a["normalized_shape"]), rank))
    labels = [t.tie(y, dims, f"{t.where} is taken over these channels") for y in x.labels]
    for v in (a.get("weight"), a.get("bias")):
        if isinstance(v, Value):
            for y in v.labels:
                t.role(v, y, "carries")
                t.lock(y, f"{t.where} is taken over these channels")
    out = Value((), tuple(Labels(y.ids) for y in labels))
    return out if not isinstance(a["out"], list | tuple) else [out, *[None] * (len(a["out"]) - 1)]
