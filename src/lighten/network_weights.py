"""Trained weights from a file into a module: safetensors, or torch's own format without pickles."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lighten.errors import BadInput, WrongUse
from lighten.progress import note

_NESTED = ("state_dict", "model_state_dict", "model", "net", "weights")
_WRAPPED = ("module.", "_orig_mod.", "model.")
"""What nn.DataParallel, torch.compile and Lightning put before every name."""

_SHOWN = 3  # names in a message
_COUNTER = "num_batches_tracked"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """State-dict names -> tensors of a .safetensors, .pt, .pth or .bin file, on the CPU.

    A state dict under "state_dict", "model" or the like is found, with a note. Raises WrongUse
    where there is no such file, BadInput where it is damaged or needs a pickle.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise WrongUse(f"there is no weights file at {path}", "give a .safetensors or .pt file")
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise WrongUse(
            f"{path} is no weights file that lighten knows", "give a .safetensors, .pt or .pth file"
        )
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, unpickling, runtime and EOF errors alike
        raise BadInput(
            f"{path} cannot be read as tensors alone: {type(error).__name__}",
            "a file that holds a whole module runs code when it is loaded, so lighten does not: "
            "save its state dict, torch.save(model.state_dict(), path)",
        ) from error
    return _state_dict(stored, file)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(file))
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(
            f"{file} is damaged or no safetensors file: {error}", "write it again"
        ) from error


def _state_dict(stored: Any, file: Path) -> dict[str, Tensor]:
    """The state dict in what a checkpoint holds."""
    if isinstance(stored, Mapping):
        if stored and all(isinstance(v, Tensor) for v in stored.values()):
            return {str(k): v for k, v in stored.items()}
        for key in _NESTED:
            inner = stored.get(key)
            if isinstance(inner, Mapping) and all(isinstance(v, Tensor) for v in inner.values()):
                note(f"{file}: the weights are under `{key}`; the rest is not used")
                return {str(k): v for k, v in inner.items()}
        found = f"a dict of {', '.join(f'`{k}`' for k in list(stored)[:_SHOWN])}"
    else:
        found = f"a {type(stored).__name__}"
    raise BadInput(f"{file} holds {found}, not a state dict", "save the model's state_dict()")


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy `weights` into a module, every name and shape checked first.

    A prefix that training wrappers leave on all names is removed, with a note. A tied parameter may
    be stored once; counters of batch norms may be absent. Raises BadInput.
    """
    own = module.state_dict(keep_vars=True)
    given = _unwrapped(weights, own, source)
    missing = [n for n in own if n not in given and not n.endswith(_COUNTER)]
    loaded = {_identity(own[n]) for n in given if n in own}
    missing = [n for n in missing if _identity(own[n]) not in loaded]
    unexpected = [n for n in given if n not in own and not n.endswith(_COUNTER)]
    wrong = [n for n in given if n in own and given[n].shape != own[n].shape]
    if missing or unexpected or wrong:
        raise BadInput(
            f"{source} does not fit {type(module).__name__}: "
            + "; ".join(_differences(missing, unexpected, wrong, given, own)),
            "is it from another architecture, width or number of classes? a factory takes "
            "arguments: module:factory(width=0.5)",
        )
    coarser = [
        n
        for n in given
        if n in own
        and own[n].is_floating_point()
        and torch.promote_types(given[n].dtype, own[n].dtype) != own[n].dtype
    ]
    if coarser:
        name = coarser[0]
        note(
            f"{source}: {len(coarser)} tensors are rounded to the module's type, "
            f"`{name}` from {_kind(given[name])} to {_kind(own[name])}"
        )
    with torch.no_grad():
        for name, value in given.items():
            if name in own:
                own[name].copy_(value)


def _unwrapped(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """The weights with the wrapper's prefixes off, where all names carry them and none fits so."""
    given = dict(weights)
    removed = ""
    while given and not any(name in own for name in given):
        prefix = next((p for p in _WRAPPED if all(n.startswith(p) for n in given)), None)
        if prefix is None:
            return dict(weights)
        given = {name[len(prefix) :]: value for name, value in given.items()}
        removed += prefix
    if removed:
        note(f"{source}: the prefix `{removed}` is removed from all names")
    return given


def _differences(
    missing: list[str],
    unexpected: list[str],
    wrong: list[str],
    given: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
) -> list[str]:
    """One phrase for each kind of misfit, its first few names, and what they may have meant."""
    said = []
    if missing:
        said.append(_named("missing", missing, [n for n in given if n not in own]))
    if unexpected:
        said.append(_named("unexpected", unexpected, [n for n in own if n not in given]))
    if wrong:
        shapes = [
            f"`{n}` is {tuple(given[n].shape)}, not {tuple(own[n].shape)}" for n in wrong[:_SHOWN]
        ]
        said.append(", ".join(shapes) + _more(wrong))
    return said


def _named(what: str, names: list[str], others: list[str]) -> str:
    words = []
    for name in names[:_SHOWN]:
        near = difflib.get_close_matches(name, others, 1)
        words.append(f"`{name}`" + (f" (nearest: `{near[0]}`)" if near else ""))
    return f"{len(names)} {what}: {', '.join(words)}" + _more(names)


def _more(names: list[str]) -> str:
    return f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""


def _identity(t: Tensor) -> object:
    """Equal for tied tensors only; on the meta device all addresses are 0."""
    return id(t) if t.is_meta else (t.data_ptr(), t.shape, t.stride()) if t.numel() else id(t)


def _kind(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
