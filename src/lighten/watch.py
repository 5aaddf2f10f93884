"""See what a network shows of a batch: its logits, features at named places, attention maps.

    places = pairs(student, teacher)
    with watch(student, [s for s, _ in places]) as see:
        seen = see(inputs)                  # or: see.seen(wrapped_student(inputs))

A place is a module's name, and what is seen there is what the module returns. In a graph that
torch.export made no module is ever called; there, the graph's record of which module each operator
came from says where a module ends, so a network and its pruned graph have the same places.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn

from lighten.errors import BadInput, WrongUse
from lighten.heads import LOGITS, beside, classes_last, first_of
from lighten.places import ends_of, graphs_in, places
from lighten.seen import Seen, by_depth


def watch(module: nn.Module, names: Iterable[str] = (), attention: bool = False) -> Watch:
    """Watch places of a module, and all of its attention maps where `attention`.

    Raises WrongUse where it has no such place.
    """
    return Watch(module, tuple(names), attention)


class Watch:
    """A module that is watched: hooks are there inside `with`, and gone after it."""

    def __init__(self, module: nn.Module, names: tuple[str, ...], attention: bool) -> None:
        self.module = module
        self.names = names
        self.attention = attention
        self._hidden: dict[str, Tensor] = {}
        self._maps: dict[str, Tensor] = {}
        self._watching = False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._marks: list[tuple[fx.GraphModule, fx.Node]] = []

    def __enter__(self) -> Watch:
        try:
            self._begin()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def __call__(self, inputs: Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]) -> Seen:
        """Run the module: on a tensor, on several (a tuple), or on inputs by name (a dict)."""
        return self.seen(self._run(inputs))

    def _run(self, inputs: Any) -> Any:
        if isinstance(inputs, Mapping):
            return self.module(**inputs)
        return self.module(*inputs) if isinstance(inputs, tuple | list) else self.module(inputs)

    def shapes(self, inputs: Any) -> dict[str, torch.Size]:
        """Run the module; place -> shape, of the places that were reached."""
        self._run(inputs)
        hidden, self._hidden, self._maps = self._hidden, {}, {}
        return {name: hidden[name].shape for name in self.names if name in hidden}

    def seen(self, outputs: Any) -> Seen:
        """What was seen in the call that gave `outputs`: for modules that something wraps (DDP).

        Raises WrongUse where a place was not reached.
        """
        hidden, maps = self._hidden, self._maps
        self._hidden, self._maps = {}, {}
        lost = [name for name in self.names if name not in hidden]
        if lost:
            raise WrongUse(
                f"nothing was seen at `{lost[0]}`: the module is not called, or returns no tensor",
                "name a module whose output is a tensor",
            )
        if self.attention:
            maps = {
                name: x
                for name, x in maps.items()
                if not any(other.startswith(f"{name}.") for other in maps)
            }
            if not maps:
                raise WrongUse(
                    f"no module of {type(self.module).__name__} returns attention maps",
                    'load transformers models with attn_implementation="eager"',
                )
        first, others = outputs_of(outputs), others_of(outputs)
        return Seen(first, {name: hidden[name] for name in self.names}, maps, others=others)

    def _begin(self) -> None:
        modules = dict(self.module.named_modules())
        graphs = graphs_in(self.module)
        ends = {name: (g, node) for g in graphs.values() for name, node in ends_of(g).items()}
        within = [f"{path}." if path else "" for path in graphs]
        called = {n: m for n, m in modules.items() if not any(n.startswith(w) for w in within)}
        for name in self.names:
            if name in ends:
                self._mark(*ends[name], name)
            elif name in called:
                self._hook(called[name], name)
            else:
                known = [*called, *ends]
                near = difflib.get_close_matches(name, known, 3)
                guess = f"did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else ""
                raise WrongUse(
                    f"{type(self.module).__name__} has no place `{name}`",
                    guess or "a place is the name of a module that returns a tensor",
                )
        for graph, _ in self._marks:
            graph.recompile()
        if self.attention:
            for name, part in modules.items():
                kind = type(part).__name__.lower()
                if "attn" in kind or "attention" in kind:
                    self._hook_attention(part, name)
        # last, so that a place that is the whole module is seen before the watch is over
        self._hooks.append(self.module.register_forward_pre_hook(self._open))
        self._hooks.append(self.module.register_forward_hook(self._close))

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for graph, node in self._marks:
            graph.graph.erase_node(node)
            graph.recompile()
        self._hooks, self._marks = [], []
        self._hidden, self._maps, self._watching = {}, {}, False

    def _open(self, module: nn.Module, inputs: Any) -> None:
        self._hidden, self._maps, self._watching = {}, {}, True

    def _close(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # a backward pass that computes a block again (checkpointing) is not watched
        self._watching = False

    def _keep(self, name: str, value: Any) -> None:
        found = _first_tensor(value)
        if self._watching and found is not None:
            self._hidden[name] = found

    def _hook(self, part: nn.Module, name: str) -> None:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self._keep(name, output)

        self._hooks.append(part.register_forward_hook(keep))

    def _mark(self, graph: fx.GraphModule, node: fx.Node, name: str) -> None:
        def seen_here(value: Any) -> None:
            self._keep(name, value)

        with graph.graph.inserting_after(node):
            self._marks.append((graph, graph.graph.call_function(seen_here, (node,))))

    def _hook_attention(self, part: nn.Module, name: str) -> None:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            maps = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if self._watching and isinstance(maps, Tensor) and maps.dim() in (3, 4):
                self._maps[name] = maps

        def ask(module: nn.Module, inputs: Any, named: dict[str, Any]) -> Any:
            return inputs, {**named, "need_weights": True, "average_attn_weights": False}

        if isinstance(part, nn.MultiheadAttention):
            self._hooks.append(part.register_forward_pre_hook(ask, with_kwargs=True))
        self._hooks.append(part.register_forward_hook(keep))


def outputs_of(output: Any) -> Tensor:
    """The logits (batch, ..., classes) in what a module returns: a tensor, a tuple that begins with
    one, a dict or a transformers ModelOutput. Outputs of 4 and 5 dimensions have their classes
    second, as segmentation does it. Of several this is the first, which labels are of. Raises
    BadInput where there are none."""
    found = first_of(output)
    if found is None and isinstance(output, Mapping):
        raise BadInput(
            f"the network gives {', '.join(str(key) for key in output)}: none is logits",
            f"wrap it in a module that returns the logits, or names them `{LOGITS[0]}`",
        )
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2:
        what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise BadInput(
            f"the network gives {what or f'a {type(output).__name__}'}, which is no logits",
            "wrap it in a module that returns a tensor (batch, ..., classes)",
        )
    return classes_last(found)


def others_of(output: Any) -> tuple[Tensor, ...]:
    """The outputs beside that, in their order, (batch, ..., classes); see lighten.heads."""
    first = first_of(output)
    return tuple(classes_last(x) for x in beside(output, first)) if first is not None else ()


def every_output(output: Any) -> tuple[Tensor, ...]:
    """All of them, the first one first; raises BadInput where there are none."""
    return outputs_of(output), *others_of(output)


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Mapping):
        value = next(iter(value.values()), None)
    if isinstance(value, tuple | list):
        value = next(iter(value), None)
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def pairs(
    student: nn.Module, teacher: nn.Module, inputs: Any = None, ends: bool = False
) -> list[tuple[str, str]]:
    """(student's place, teacher's place): all blocks where both have the same, else by depth.

    Blocks are grouped in stages: by the list that they are in, or, where inputs are given to run on
    (a tensor, a tuple or a dict), by size in space. Stages go together in order where there are as
    many, else those with one name or size; inside a stage, places that lie equally deep. ends: only
    the last of each stage. Raises WrongUse where a network has no such places.
    """
    s, t = _stages(student, inputs), _stages(teacher, inputs)
    if {name for _, names in s for name in names} == {name for _, names in t for name in names}:
        together = [(names, names) for _, names in s]
    elif len(s) == len(t):
        together = [(a, b) for (_, a), (_, b) in zip(s, t, strict=True)]
    else:
        sizes = dict(t)
        together = [(names, sizes[key]) for key, names in s if key in sizes]
    if not together:
        together = [([n for _, names in s for n in names], [n for _, names in t for n in names])]
    found = [[(a[i], b[j]) for i, j in by_depth(len(a), len(b))] for a, b in together]
    return [pair for stage in found for pair in (stage[-1:] if ends else stage)]


def _stages(module: nn.Module, inputs: Any) -> list[tuple[Any, list[str]]]:
    """(what the stage is known by, its places), in order of depth."""
    names = places(module)
    keys: dict[str, Any] = {name: name.rpartition(".")[0] for name in names}
    if inputs is not None:
        shapes = _shapes(module, names, inputs)
        names = [name for name in names if name in shapes]
        # by size only where there is space: (batch, channels, height, width)
        keys |= {n: tuple(shape[2:]) for n, shape in shapes.items() if len(shape) > 3}
    found: list[tuple[Any, list[str]]] = []
    for name in names:
        if not found or found[-1][0] != keys[name]:
            found.append((keys[name], []))
        found[-1][1].append(name)
    return found


def _shapes(module: nn.Module, names: list[str], inputs: Any) -> dict[str, torch.Size]:
    """Place -> the shape of what is seen there; places that a run does not reach are left out."""
    modes = [part for part in module.modules() if part.training]
    for part in modes:
        part.training = False  # not eval(): a graph of torch.export refuses that
    try:
        with watch(module, names) as see, torch.no_grad():
            return see.shapes(inputs)
    finally:
        for part in modes:
            part.training = True
