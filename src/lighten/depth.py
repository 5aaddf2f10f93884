"""Fewer layers: repeated blocks of a network left out, where it still runs and gives its shapes.

A block repeats where its neighbour in the same list (ModuleList, Sequential) is of its class and
has parameters of the same shapes. The first and the last of each list stay, what goes is spread
evenly: the blocks that stay do most of what they did, since each adds a little to a stream.

*Source:* Sanh et al. 2019, "DistilBERT", section 3 (one of two layers); Fan et al. 2019, "Reducing
Transformer Depth on Demand with Structured Dropout", section 3.2 (every other layer).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lighten.errors import BadInput, WrongUse
from lighten.network import Network

Blocks = Mapping[str, Sequence[int]]
"""List of blocks -> those that stay, by their place in it."""

_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_PER_LAYER = ("layer_types", "mlp_layer_types")


@torch.no_grad()
def shallower(network: Network, share: float) -> tuple[Network, dict[str, list[int]]]:
    """A copy with about `share` of the blocks of each list, its weights kept, and which stay.

    A list whose blocks cannot go (the network then does not run, or gives other shapes) stays
    whole, and the result's notes say so. Raises WrongUse where no block can go.
    """
    if not 0 < share <= 1:
        raise WrongUse(f"a depth of {share:g}", 'a share of the blocks, such as "half depth"')
    if share == 1:
        return network, {}
    wanted = _shapes(network)
    found: dict[str, list[int]] = {}
    refused: list[str] = []
    module = network.module
    for path, blocks in _lists(module):
        if any(path.startswith(f"{done}.") for done in found):
            continue
        kept = spread(len(blocks), _repeated(blocks), share)
        if len(kept) == len(blocks):
            continue
        trial = copy.deepcopy(module)
        take_blocks(trial, {path: kept})
        try:
            same = _shapes(network.with_module(trial)) == wanted
            why = "its outputs have other shapes without them"
        except Exception as error:  # a forward may fail in any way it likes
            same, why = False, f"it does not run without them ({type(error).__name__}: {error})"
        if same:
            module, found[path] = trial, kept
        else:
            refused.append(f"blocks of `{path}` stay: {why}")
    if not found:
        why = f": {refused[0]}" if refused else ""
        raise WrongUse(
            f"{network.source} has no repeated blocks that can be left out{why}",
            "ask for a share of the width only, or name a student of your own",
        )
    notes = (*network.notes, *refused)
    return Network(module, network.inputs, network.source, notes), found


def spread(count: int, free: set[int], share: float) -> list[int]:
    """Which of `count` blocks stay: all that are not `free`, the first and the last, and of the
    others as many, evenly spread, as make about `share` of all.

    >>> spread(9, set(range(9)), 0.5), spread(4, {1, 2, 3}, 0.5), spread(6, {1, 2}, 0.1)
    ([0, 2, 4, 6, 8], [0, 3], [0, 3, 4, 5])
    """
    inner = sorted(free - {0, count - 1})
    forced = set(range(count)) - set(inner)
    want = min(len(inner), max(0, int(share * count + 0.5) - len(forced)))
    picked = {inner[int((2 * j + 1) * len(inner) / (2 * want))] for j in range(want)}
    return sorted(forced | picked)


def take_blocks(module: nn.Module, blocks: Blocks) -> None:
    """Leave only these blocks in the lists of a module, in place; raises BadInput where they are
    not there. What a transformers configuration counts is counted again."""
    for path, kept in blocks.items():
        try:
            home = module.get_submodule(path)
            names = list(home._modules)
            if not isinstance(home, nn.ModuleList | nn.Sequential) or sorted(set(kept)) != [*kept]:
                raise AttributeError
            left = [names[i] for i in kept]
        except (AttributeError, IndexError, TypeError) as error:
            raise BadInput(
                f"`{path}` has no blocks {list(kept)}", "give the network that they were taken from"
            ) from error
        members = [home._modules[name] for name in left]
        numbered = all(name.isdigit() for name in names)
        home._modules.clear()
        for i, (name, part) in enumerate(zip(left, members, strict=True)):
            home._modules[str(i) if numbered else name] = part
        _recount(module, members, kept, len(names))


def _recount(
    module: nn.Module, members: Sequence[nn.Module | None], kept: Sequence[int], count: int
) -> None:
    """Numbers that say which layer a block is, and how many there are."""
    for new, (old, block) in enumerate(zip(kept, members, strict=True)):
        for part in block.modules() if block is not None else ():
            if getattr(part, "layer_idx", None) == old:
                part.layer_idx = new  # type: ignore[assignment]
    configs = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    for config in configs.values():
        counted: Any = [field for field in _COUNTS if getattr(config, field, None) == count]
        for field in _PER_LAYER if counted else ():
            each = getattr(config, field, None)
            if isinstance(each, list | tuple) and len(each) == count:
                setattr(config, field, [each[i] for i in kept])
        for field in counted:
            setattr(config, field, len(kept))


def _lists(module: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    """(path, members) of all lists, outer before inner."""
    return [
        (path, list(part._modules.values()))  # type: ignore[arg-type]
        for path, part in module.named_modules()
        if isinstance(part, nn.ModuleList | nn.Sequential) and None not in part._modules.values()
    ]


def _repeated(blocks: Sequence[nn.Module]) -> set[int]:
    """The blocks that have a neighbour like themselves."""
    signs = [_sign(block) for block in blocks]
    alike = [i for i in range(len(signs) - 1) if signs[i] is not None and signs[i] == signs[i + 1]]
    return {i for first in alike for i in (first, first + 1)}


def _sign(block: nn.Module) -> tuple[Any, ...] | None:
    """What blocks that repeat have in common; None of what is no block: a layer, or no weights."""
    if not any(True for _ in block.children()) or not any(True for _ in block.parameters()):
        return None
    state = block.state_dict()
    return (type(block), *((name, tuple(t.shape), t.dtype) for name, t in state.items()))


def _shapes(network: Network) -> list[torch.Size]:
    return [x.shape for x in tree_leaves(network(*network.inputs)) if isinstance(x, Tensor)]
