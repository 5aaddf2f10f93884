"""Where two networks can be compared: the ends of their blocks, found by structure.

A block is a module with parts that is an item of a list (ModuleList, Sequential): `layer1.0`,
`model.layers.7`. A network without such lists has a place before each weight but the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from lighten.errors import WrongUse

_LISTS = ("Sequential", "ModuleList")


@dataclass(frozen=True)
class _Part:
    """A module: kind is its class. weighted: it has a weight of two dimensions or more."""

    kind: str
    weighted: bool


def places(module: nn.Module) -> list[str]:
    """The ends of a network's blocks, in order of depth; raises WrongUse where it has none.

    A module that says itself where they are (`places`, their names) is believed.
    """
    own = getattr(module, "places", None)
    if isinstance(own, tuple) and own:
        return list(own)
    parts = _parts(module)
    found: list[str] = []
    for path in parts:
        inside = any(path.startswith(f"{block}.") for block in found)
        if not inside and path.rpartition(".")[2].isdigit() and _is_block(path, parts):
            found.append(path)
    found = found or _before_weights(parts)
    if not found:
        raise WrongUse(
            f"{type(module).__name__} has no blocks to compare", "name the places by hand"
        )
    return found


def graphs_in(module: nn.Module) -> dict[str, fx.GraphModule]:
    """Path -> graph, of those made by torch.export: they call operators, never modules."""
    return {
        path: part
        for path, part in module.named_modules()
        if isinstance(part, fx.GraphModule)
        and not any(node.op == "call_module" for node in part.graph.nodes)
    }


def ends_of(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """Module -> the operator that gives what it returns, in order of execution."""
    found: dict[str, fx.Node] = {}
    for node in graph.graph.nodes:
        # the last one inside whose value is read outside: what follows it is for itself
        for path in _modules_of(node):
            read_outside = any(path not in _modules_of(user) for user in node.users)
            if read_outside or path not in found:
                found[path] = node
    return found


def _modules_of(node: fx.Node) -> list[str]:
    """The modules that an operator came from, the outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [str(path) for path, _ in stack.values() if path]


def _parts(module: nn.Module) -> dict[str, _Part]:
    """Path -> part, of all modules that are called, outer before inner."""
    modules = dict(module.named_modules())
    found: dict[str, _Part] = {}
    graphs = graphs_in(module)
    for prefix, graph in graphs.items():
        inner = dict(graph.named_modules())
        for node in graph.graph.nodes:
            for path, kind in (node.meta.get("nn_module_stack") or {}).values():
                name = getattr(kind, "__name__", str(kind)).rpartition(".")[2]
                if path:
                    found.setdefault(str(path), _Part(name, _weighted(inner.get(str(path)))))
        modules = {k: m for k, m in modules.items() if k != prefix and not _under(k, prefix)}
    for path, part in modules.items():
        if path and not graphs:
            found[path] = _Part(type(part).__name__, _weighted(part))
    return found


def _under(path: str, prefix: str) -> bool:
    return not prefix or path.startswith(f"{prefix}.")


def _weighted(part: nn.Module | None) -> bool:
    return part is not None and any(p.dim() > 1 for p in part.parameters(recurse=False))


def _children(path: str, parts: Mapping[str, _Part]) -> list[str]:
    return [p for p in parts if p.rpartition(".")[0] == path]


def _is_block(path: str, parts: Mapping[str, _Part]) -> bool:
    """Whether it has parts and is no list of blocks itself."""
    children = _children(path, parts)
    deep = any(_children(child, parts) for child in children)
    return bool(children) and not (deep and parts[path].kind in _LISTS)


def _before_weights(parts: Mapping[str, _Part]) -> list[str]:
    """The leaf before each weighted leaf but the first: behind norm and activation."""
    leaves = [path for path in parts if not _children(path, parts)]
    heavy = [i for i, path in enumerate(leaves) if parts[path].weighted]
    return [leaves[i - 1] for i in heavy[1:]]
