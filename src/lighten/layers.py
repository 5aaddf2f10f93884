"""What a module is made of: its blocks, its weights as (out, in), and who sees the same input.

Everything is read off a skeleton on the meta device, so no architecture is known by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lighten.types import Layer

_POSITIONS = 4  # tokens of the run that finds shared inputs


def find_blocks(module: nn.Module) -> tuple[str, ...]:
    """Prefixes of the repeated blocks, in order: the module list with the most weights."""
    best, most = ("", nn.ModuleList()), 0
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and len(child):
            size = sum(p.numel() for p in child.parameters())
            if size > most:  # an inner list is smaller than the list that holds it
                best, most = (name, child), size
    return tuple(f"{best[0]}.{i}" for i in range(len(best[1])))


def aliases(module: nn.Module) -> dict[str, str]:
    """Every name of a tied parameter but the first -> the first."""
    first: dict[int, str] = {}
    out = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            out[name] = first[id(parameter)]
    return out


def find_layers(module: nn.Module, blocks: tuple[str, ...]) -> tuple[Layer, ...]:
    """Every matrix of a linear, Conv1D or embedding, in the module's order, tied ones once."""
    tied = aliases(module)
    head = _weight_of(module, "get_output_embeddings")
    embedding = _weight_of(module, "get_input_embeddings")
    shares, calls = shared_inputs(module)
    layers = []
    for name, child, transposed in matrices(module):
        if f"{name}.weight" in tied:
            continue
        block = _block(name, blocks)
        if isinstance(child, nn.Embedding):
            kind = "embedding" if child.weight is embedding else "positions"
            kind += "+head" if child.weight is head and kind == "embedding" else ""
        else:
            kind = "head" if child.weight is head and block is None else "linear"
        rows, columns = child.weight.shape
        shape = (columns, rows) if transposed else (rows, columns)
        layers.append(
            Layer(
                name=f"{name}.weight",
                kind=kind,
                shape=shape,
                calls=max(calls.get(name, 1), 1),
                transposed=transposed,
                block=block,
                shares=f"{shares.get(name, name)}.weight",
            )
        )
    return tuple(layers)


def _weight_of(module: nn.Module, getter: str) -> Tensor | None:
    found = getattr(module, getter, lambda: None)()
    weight: Tensor | None = getattr(found, "weight", None)
    return weight


def _block(name: str, blocks: tuple[str, ...]) -> int | None:
    for i, prefix in enumerate(blocks):
        if name.startswith(f"{prefix}."):
            return i
    return None


def matrices(module: nn.Module) -> Iterator[tuple[str, Any, bool]]:
    """(name, module, stored as (in, out)) of all that multiply by, or look up, a matrix."""
    from transformers.pytorch_utils import Conv1D

    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            yield name, child, False
        elif isinstance(child, Conv1D):
            yield name, child, True


def shared_inputs(module: nn.Module) -> tuple[dict[str, str], dict[str, int]]:
    """(module -> the first module that is given the very same tensor, module -> calls).

    One run on the meta device, which moves no numbers. Only the same object, not changed in
    place between, counts as the same input; what cannot run so shares with nobody.
    """
    n = _POSITIONS
    tokens = torch.zeros(1, n, dtype=torch.long, device="meta")
    # a ready 4-D mask spares most models the look at values, which meta tensors do not have
    mask = torch.zeros(1, 1, n, n, device="meta")
    seen = [_run(module, input_ids=tokens, attention_mask=mask)]
    if not seen[0].whole:
        seen.append(_run(module, input_ids=tokens))
    best = max(seen, key=lambda s: len(s.calls))
    twice = {name for name, count in best.calls.items() if count > 1}
    shares = {k: v for k, v in best.shares.items() if v not in twice and k not in twice}
    return shares, best.calls


@dataclass
class _Seen:
    """What the linears of a module were given in one run; `whole` if it came to its end."""

    first: dict[tuple[int, int], str] = field(default_factory=dict)
    shares: dict[str, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)  # so that no id is given out again
    whole: bool = False

    def note(self, name: str, args: tuple[Any, ...]) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        if args and isinstance(args[0], Tensor):
            self.kept.append(args[0])
            self.shares[name] = self.first.setdefault((id(args[0]), args[0]._version), name)


def _run(module: nn.Module, **inputs: Tensor) -> _Seen:
    seen = _Seen()
    handles = [
        child.register_forward_pre_hook(lambda _, args, name=name: seen.note(name, args))
        for name, child, _ in matrices(module)
        if not isinstance(child, nn.Embedding)
    ]
    try:
        with torch.no_grad():
            module(use_cache=False, **inputs)
        seen.whole = True
    except Exception:  # a module that asks for values: what it was seen to do until there stands
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen
