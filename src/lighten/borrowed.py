"""Networks on a device for a while: they come back to where they were, in the modes they had.

A graph of torch.export has the device that it was traced on in the calls that make tensors
(`arange`, `zeros`) and that move them; it runs elsewhere once those name the other device.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.node import map_aggregate


@contextmanager
def borrowed(*modules: nn.Module) -> Iterator[None]:
    """Whatever happens inside: devices and modes of these modules are as before at the end."""
    homes = [(module, _device_of(module)) for module in modules]
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        yield
    finally:
        for module, home in homes:
            if home is not None:
                send(module, home)
        for part, mode in modes.items():
            part.training = mode


def own_copy(module: nn.Module) -> nn.Module:
    """A copy that shares nothing with the module."""
    with warnings.catch_warnings():
        # torch warns of how it compares the specs of a graph's arguments when it copies them itself
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(module)


def send(module: nn.Module, device: torch.device) -> None:
    """Move a module in place, and what its graphs make on a device of their own."""
    module.to(device)
    for part in module.modules():
        if isinstance(part, GraphModule):
            _send_graph(part, device)


def _send_graph(part: GraphModule, device: torch.device) -> None:
    def sent(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    changed = False
    for node in part.graph.nodes:
        args, kwargs = map_aggregate(node.args, sent), map_aggregate(node.kwargs, sent)
        if (args, kwargs) != (node.args, node.kwargs):
            node.args, node.kwargs, changed = args, kwargs, True
    if changed:
        part.recompile()


def _device_of(module: nn.Module) -> torch.device | None:
    first = next(chain(module.parameters(), module.buffers()), None)
    return None if first is None else first.device
