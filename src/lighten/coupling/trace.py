"""Run an ATen graph on labels: every operator says which channels become the same channel."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lighten.coupling.labels import Classes, Labels, Value

Args = Mapping[str, Any]
Rule = Callable[["Trace", Args], Any]

RULES: dict[str, Rule] = {}
"""ATen operator -> what it does to labels. Arguments come by their names in the schema."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


@dataclass
class Origin:
    """Labels start..start+size stand for the positions of one dimension of a stored tensor.

    order: of its first use.
    """

    parameter: str
    dim: int
    start: int
    size: int
    role: str | None = None
    order: int = 2**62


@dataclass(frozen=True)
class Stored:
    """A stored tensor that has labels."""

    name: str
    rank: int


@dataclass
class Trace:
    """What running a graph on labels has found.

    values: node's name -> its Value (or a list of them). unknown: operator -> names of its nodes.
    divisors: labels by which something is divided. marks: kind of unit -> labels of such units.
    """

    classes: Classes = field(default_factory=Classes)
    values: dict[str, Any] = field(default_factory=dict)
    origins: list[Origin] = field(default_factory=list)
    tensors: list[Stored] = field(default_factory=list)
    unknown: dict[str, list[str]] = field(default_factory=dict)
    divisors: list[Tensor] = field(default_factory=list)
    marks: dict[str, list[Tensor]] = field(default_factory=dict)
    node: fx.Node | None = None
    _deferred: list[tuple[Labels, Labels, str]] = field(default_factory=list)
    _rectangles: list[Labels] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)

    # -- what rules say

    @property
    def where(self) -> str:
        """The operator that is being run, for a reason."""
        return f"`{operator_name(self.node)}` ({self.node.name})" if self.node else ""

    def fresh(self, shape: Sequence[int], zero: bool = False) -> tuple[Labels, ...]:
        """New labels for every dimension of a tensor that has more than one position."""
        found = []
        for dim, size in enumerate(shape):
            if size > 1:
                ids = self.classes.fresh(size)
                found.append(Labels(ids.view([-1 if d == dim else 1 for d in range(len(shape))])))
        return tuple(Labels(x.ids, zero) for x in found)

    def unite(self, a: Tensor, b: Tensor) -> None:
        self.classes.unite(a, b, f"meets what cannot shrink in {self.where}")

    def lock(self, labels: Labels | Iterable[Labels], why: str) -> None:
        for x in [labels] if isinstance(labels, Labels) else labels:
            self.classes.lock(x.ids, why)

    def tie(self, x: Labels, dims: Iterable[int], why: str, mark: str | None = None) -> Labels:
        """Nothing can be removed along dims alone: units that span them become whole, or, where x
        varies along no other dimension, it is locked. Returns x at the first position of dims."""
        rigid = x.varies & set(dims)
        if not rigid:
            return x
        if rigid == x.varies:
            self.lock(x, why)
            return Labels(torch.zeros((1,) * x.ids.dim(), dtype=torch.int64), x.zero)
        head = x.first(rigid)
        self.classes.unite(x.ids, head.ids, why)
        if mark:
            self.marks.setdefault(mark, []).append(head.ids.reshape(-1))
        return head

    def meet(self, groups: Iterable[Iterable[Labels]]) -> list[Labels]:
        """Labels of several tensors of one rank, elementwise the same channel where both vary."""
        out: list[Labels] = []
        for group in groups:
            for x in group:
                x = self._absorb(out, x)
                if x.varies:
                    out.append(x)
        return out

    def _absorb(self, out: list[Labels], x: Labels) -> Labels:
        for old in list(out):
            shared = old.varies & x.varies
            if not shared:
                continue
            zero = old.zero or x.zero
            if old.varies == x.varies:
                self.unite(old.ids, x.ids)
            elif x.varies < old.varies:
                self._deferred.append((old, x, self.where))
            elif old.varies < x.varies:
                self._deferred.append((x, old, self.where))
                old = x
            else:
                why = f"crosses another dimension in {self.where}"
                self.tie(old, shared, why)
                x = self.tie(x, shared, why)
                continue
            out[:] = [o for o in out if not (o.varies & x.varies)]
            x = Labels(old.ids, zero)
        return x

    def settle(self) -> None:
        """Decide what could be decided either way while the graph ran.

        Labels y[d] that met x[h, d]: if x turned out the same along h, y is one with it; if it did
        along d (whole heads), y is shared by all and stays; else y is one with it. Labels that then
        still vary along two dimensions keep the widest: what is left must be a rectangle.
        """
        waiting = self._deferred
        while waiting:
            roots = self.classes.roots()
            undecided = []
            for big, small, where in waiting:
                extra = big.varies - small.varies
                if _same_along(roots, big, extra):
                    self.classes.unite(big.ids, small.ids, f"meets what is locked in {where}")
                elif _same_along(roots, big, small.varies):
                    self.lock(small, f"one for all units in {where}")
                else:
                    undecided.append((big, small, where))
            if len(undecided) == len(waiting):
                big, small, where = undecided.pop(0)
                self.classes.unite(big.ids, small.ids, f"meets what is locked in {where}")
            waiting = undecided
        self._square()

    def _square(self) -> None:
        roots = self.classes.roots()
        for x in self._rectangles:
            varying = [d for d in x.varies if not _same_along(roots, x, {d})]
            if len(varying) > 1:
                keep = max(varying, key=lambda d: (x.ids.shape[d], d))
                rest = [d for d in varying if d != keep]
                self.classes.unite(x.ids, x.first(rest).ids, "not a rectangle of channels")
                self.marks.setdefault("groups", []).append(x.first(rest).ids.reshape(-1))
                roots = self.classes.roots()

    def role(self, value: Value, labels: Labels, role: str) -> None:
        """Note what a stored tensor's labels are for; the first use counts."""
        if not value.stored:
            return
        ids = labels.ids.reshape(-1)
        label = int(ids.max())
        if label <= 0:
            return
        i = bisect_right(self.origins, label, key=lambda o: o.start) - 1
        if i >= 0 and label < self.origins[i].start + self.origins[i].size:
            origin = self.origins[i]
            if origin.role is None:
                origin.role, origin.order = role, len(self.values)

    # -- running

    def store(self, name: str, shape: tuple[int, ...]) -> Value:
        """Label a stored tensor."""
        labels = self.fresh(shape, zero=True)
        self.tensors.append(Stored(name, len(shape)))
        for x in labels:
            (dim,) = x.varies
            self.origins.append(Origin(name, dim, int(x.ids.min()), shape[dim]))
        return Value(shape, labels, stored=True)

    def run(self, graph: fx.GraphModule, stored: Mapping[str, str]) -> None:
        """stored: get_attr target -> name of the tensor, tied ones under one name."""
        by_name: dict[str, Value] = {}
        for node in graph.graph.nodes:
            self.node = node
            if node.op == "get_attr":
                name = stored.get(str(node.target)) if node.users else None
                if name is None:
                    self.values[node.name] = blank(concrete(node.meta.get("val")), stored=True)
                else:
                    if name not in by_name:
                        by_name[name] = self.store(name, tuple(node.meta["val"].shape))
                    self.values[node.name] = by_name[name]
            elif node.op == "placeholder":
                self.values[node.name] = blank(concrete(node.meta.get("val")))
            elif node.op == "call_function":
                self.values[node.name] = self._call(node)
                self._note(self.values[node.name])
            elif node.op == "output":
                for x in leaves(fx.map_arg(node.args, self._value)):
                    self.lock(x.labels, "an output of the network")
        self.node = None
        self.settle()

    def _value(self, node: fx.Node) -> Any:
        return self.values[node.name]

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self.values[node.args[0].name][node.args[1]]  # type: ignore[union-attr,index]
        given = leaves(fx.map_arg((node.args, node.kwargs), self._value))
        name = operator_name(node)
        function = RULES.get(name)
        stored = all(v.stored for v in given)
        plain = blank(concrete(node.meta.get("val")), stored)
        named = [x for v in given for x in v.labels]
        if given and not named:
            return plain
        if function is None or not isinstance(node.target, torch._ops.OpOverload):
            return self._unknown(node, name, named, plain, "has no rule")
        try:
            return _checked(function(self, arguments(node, self._value)), plain)
        except (LookupError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            # arguments that its rule does not foresee: as good as no rule
            return self._unknown(
                node, name, named, plain, f"is used as its rule does not know: {error!r}"
            )

    def _unknown(self, node: fx.Node, name: str, named: list[Labels], plain: Any, why: str) -> Any:
        if named:
            self.unknown.setdefault(name, []).append(node.name)
            self.lock(named, f"operator `{name}` {why}")
        return plain

    def _note(self, value: Any) -> None:
        for v in leaves(value):
            for x in v.labels:
                if len(x.varies) > 1 and id(x) not in self._seen:
                    self._seen.add(id(x))
                    self._rectangles.append(x)


def _same_along(roots: Any, x: Labels, dims: Iterable[int]) -> bool:
    ids = roots[x.ids.numpy()]
    return bool((ids == roots[x.first(dims).ids.numpy()]).all())


def operator_name(node: fx.Node) -> str:
    """`add` for aten.add_.Tensor: the operator without overload and in-place mark."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    space, _, name = str(schema.name).partition("::")
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return name if space == "aten" else f"{space}::{name}"


def arguments(node: fx.Node, value: Callable[[fx.Node], Any]) -> dict[str, Any]:
    """All arguments of an operator by their schema's names, defaults filled in."""
    found: dict[str, Any] = {}
    for i, a in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if i < len(node.args) and not a.kwarg_only:
            found[a.name] = node.args[i]
        elif a.name in node.kwargs:
            found[a.name] = node.kwargs[a.name]
        else:
            found[a.name] = a.default_value if a.has_default_value() else None
    mapped = {k: fx.map_arg(v, value) for k, v in found.items()}
    mapped["out"] = concrete(node.meta.get("val"))
    return mapped


def concrete(val: Any) -> Any:
    """What a node returns, its symbolic sizes replaced by those that were traced."""
    if isinstance(val, list | tuple):
        return [concrete(v) for v in val]
    if isinstance(val, torch.SymInt):
        return int(val.node.hint)
    if isinstance(val, Tensor):
        return torch.empty([concrete(n) for n in val.shape], dtype=val.dtype, device="meta")
    return val


def blank(val: Any, stored: bool = False) -> Any:
    """A value without labels, in the form of what the node returns."""
    if isinstance(val, Tensor):
        return Value(tuple(val.shape), (), stored)
    if isinstance(val, list | tuple):
        return [blank(v, stored) for v in val]
    return val


def leaves(value: Any) -> list[Value]:
    return [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, Value)]


def _checked(value: Any, plain: Any) -> Any:
    """The rule's answer with labels that fit the shapes of what the operator really returns."""
    if isinstance(plain, list):
        if len(value) != len(plain):
            raise RuntimeError(f"a rule returned {len(value)} values of {len(plain)}")
        return [_checked(v, p) for v, p in zip(value, plain, strict=True)]
    if not isinstance(plain, Value):
        return plain
    if value is None:
        return plain
    for x in value.labels:
        fits = x.ids.dim() == len(plain.shape) and all(
            a in (1, b) for a, b in zip(x.ids.shape, plain.shape, strict=True)
        )
        if not fits:
            raise RuntimeError(f"a rule returned labels {tuple(x.ids.shape)} for {plain.shape}")
    return Value(plain.shape, tuple(x for x in value.labels if x.varies), plain.stored)
