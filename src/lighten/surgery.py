"""Remove channels from a module in place: tensors by name, and the attributes that repeat sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lighten.coupling.axes import Couplings, Keep, Left, stored_names
from lighten.coupling.trace import operator_name
from lighten.network import Network

Positions = Mapping[str, Mapping[int, Tensor]]
"""Tensor name -> dimension -> kept positions."""

# integers of an attention module that count heads, or heads times their size
_COUNTS = (
    "num_heads", "n_heads", "n_head", "heads", "nhead", "num_attention_heads", "all_head_size",
    "num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "inner_dim", "split_size",
)  # fmt: skip


def taken(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """A copy with the kept positions only."""
    for dim, kept in dims.items():
        tensor = tensor.index_select(dim, kept.to(tensor.device))
    return tensor.contiguous()


@torch.no_grad()
def cut(module: nn.Module, positions: Positions) -> None:
    """Replace every tensor that shrinks, tied ones by one; standard modules learn their sizes."""
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors |= dict(module.named_buffers(remove_duplicate=False))
    made: dict[str, Tensor] = {}
    for name, first in stored_names(module).items():
        if first not in positions:
            continue
        old = tensors[name]
        if first not in made:
            new = taken(old.detach(), positions[first])
            is_parameter = isinstance(old, nn.Parameter)
            made[first] = nn.Parameter(new, old.requires_grad) if is_parameter else new
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        shape = tuple(old.shape)
        setattr(owner, leaf, made[first])
        _fit(owner, leaf, shape, tuple(made[first].shape))


def _fit(owner: nn.Module, leaf: str, old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """The sizes that a standard module keeps beside its tensors."""
    if isinstance(owner, nn.RNNBase):
        if leaf == "weight_ih_l0":
            owner.input_size = new[1]
        if leaf == "weight_hh_l0":
            gates = old[0] // owner.hidden_size
            owner.hidden_size = new[0] // gates
            if owner.proj_size:
                owner.proj_size = new[1]
        return
    if leaf not in ("weight", "running_mean"):
        return
    if isinstance(owner, nn.modules.conv._ConvNd):
        _fit_convolution(owner, old, new)
    elif isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = new
    elif isinstance(owner, nn.Embedding):
        owner.num_embeddings, owner.embedding_dim = new
    elif isinstance(owner, nn.modules.batchnorm._NormBase):
        owner.num_features = new[0]
    elif isinstance(owner, nn.GroupNorm):
        owner.num_groups = owner.num_groups * new[0] // old[0]
        owner.num_channels = new[0]
    elif isinstance(owner, nn.LayerNorm | nn.RMSNorm):
        owner.normalized_shape = new
    elif isinstance(owner, nn.PReLU):
        owner.num_parameters = new[0]
    elif len(new) == 2 and (_integer(owner, "nx"), _integer(owner, "nf")) == old:
        owner.nx, owner.nf = new  # type: ignore[assignment]


def _fit_convolution(
    owner: nn.modules.conv._ConvNd, old: tuple[int, ...], new: tuple[int, ...]
) -> None:
    outs, ins = (1, 0) if owner.transposed else (0, 1)
    if old[1] == 1 and owner.groups > 1 and not owner.transposed:  # depthwise
        owner.groups = owner.groups * new[0] // old[0]
    grouped = owner.groups
    owner.out_channels = new[outs] * (grouped if owner.transposed else 1)
    owner.in_channels = new[ins] * (1 if owner.transposed else grouped)


def _integer(owner: nn.Module, name: str) -> int | None:
    value: Any = getattr(owner, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def count_heads(module: nn.Module, couplings: Couplings, keep: Keep) -> None:
    """Attributes that count the heads of an attention module, where its heads were removed."""
    done: set[tuple[int, str]] = set()
    for name, kept in keep.items():
        axis = couplings[name]
        if axis.kind != "heads" or len(kept) == axis.width:
            continue
        for member in axis.members:
            for path in _owners(member.parameter):
                owner = module.get_submodule(path)
                if isinstance(owner, nn.MultiheadAttention):
                    continue
                for attribute in _COUNTS:
                    value = _integer(owner, attribute)
                    if value and value % axis.width == 0 and (id(owner), attribute) not in done:
                        done.add((id(owner), attribute))
                        setattr(owner, attribute, value * len(kept) // axis.width)


def count_bare_norms(module: nn.Module, network: Network, left: Left) -> None:
    """Attributes of norms that have no tensors: how many channels or groups they see."""
    kinds = (nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)
    if not any(isinstance(m, kinds) and m.weight is None for m in module.modules()):
        return
    for node in network.graph.graph.nodes:
        if node.op != "call_function" or operator_name(node) not in ("instance_norm", "group_norm"):
            continue
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]) if stack else ""
        owner = dict(module.named_modules()).get(path)
        if getattr(owner, "weight", None) is not None:
            continue
        x = left.value(node.args[0])
        size = left.size(x, 1)
        if isinstance(owner, nn.modules.instancenorm._InstanceNorm):
            owner.num_features = size
        elif isinstance(owner, nn.GroupNorm) and owner.num_channels != size:
            owner.num_groups = owner.num_groups * size // owner.num_channels
            owner.num_channels = size


def _owners(parameter: str) -> list[str]:
    """The module that holds a parameter and the one around it."""
    owner = parameter.rpartition(".")[0]
    return [owner, owner.rpartition(".")[0]] if owner else [owner]
