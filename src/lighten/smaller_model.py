"""A smaller language model as a Hugging Face folder: another config, other tensors, the same words.

What a config counts by layers is counted again; a folder is written tensor by tensor.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lighten import layers
from lighten.calibrate import Stream
from lighten.containers import folder
from lighten.containers.safetensors import Entry, Shards
from lighten.errors import WrongUse
from lighten.model import Model, open_model
from lighten.seeds import seed_of

_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim")
"""What configs call the width of their feed-forward parts."""

_NEAR = 1e-3
"""Relative difference of hidden states that rounding may make."""


def fewer_layers(model: Model, kept: Sequence[int]) -> dict[str, Any]:
    """Entries of the config that say so; raises WrongUse where it cannot."""
    config, count = model.config, len(model.blocks)
    named = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    if getattr(config, named, None) != count:
        raise WrongUse(
            f"the config of {model.source} ({config.model_type}) does not say how many layers it"
            f" has in one place: {named} is {getattr(config, named, None)}, there are {count}",
            "name another model as the student",
        )
    changes: dict[str, Any] = {named: len(kept)}
    for key, value in config.to_dict().items():
        if "layer" in key and isinstance(value, list | tuple) and len(value) == count:
            changes[key] = [value[i] for i in kept]
    return changes


def feed_forward_width(model: Model) -> tuple[str, int]:
    """(key of the config, units); raises WrongUse where it does not say."""
    for key in _WIDTHS:
        if hasattr(model.config, key):
            value = getattr(model.config, key)
            return key, int(4 * model.config.hidden_size if value is None else value)
    raise WrongUse(
        f"the config of {model.source} ({model.config.model_type}) does not say how wide its"
        " feed-forward parts are",
        'ask for fewer layers only, such as "half depth"',
    )


def renamed(model: Model, kept: Sequence[int]) -> dict[str, str]:
    """Tensor of the smaller model -> that of the whole one: blocks are numbered again."""
    places = {f"{model.blocks[old]}.": f"{model.blocks[new]}." for new, old in enumerate(kept)}
    gone = tuple(f"{name}." for i, name in enumerate(model.blocks) if i not in kept)
    found = {}
    for name in model.tensors:
        if name.startswith(gone):
            continue
        before = next((p for p in places if name.startswith(p)), "")
        found[places.get(before, "") + name.removeprefix(before)] = name
    return found


def stored_dtype(model: Model, name: str) -> torch.dtype:
    """What a tensor is written as: as it is stored, out of a GGUF float16 (vectors float32)."""
    lazy = model.tensors[name]
    if model.kind == "gguf":
        return torch.float16 if len(lazy.shape) > 1 else torch.float32
    return lazy.dtype


def write(
    model: Model, path: Path, changes: Mapping[str, Any], entries: Sequence[Entry],
    load: Callable[[str], Tensor],
) -> Model:  # fmt: skip
    """A whole folder with the words of `model` and its config but for `changes`; opened."""
    files = folder.small_files(model, folder.weight_dtype(model), **changes)
    folder.write_folder(path, files, Shards.of(entries), load)
    return open_model(path)


def write_shallow(model: Model, path: Path, kept: Sequence[int]) -> Model:
    """The model with these of its blocks only."""
    names = renamed(model, kept)
    entries = [
        Entry(new, stored_dtype(model, old), tuple(model.tensors[old].shape))
        for new, old in names.items()
    ]

    def load(name: str) -> Tensor:
        return model.tensors[names[name]].load().to(stored_dtype(model, names[name]))

    return write(model, path, fewer_layers(model, kept), entries, load)


def write_fresh(model: Model, path: Path, changes: Mapping[str, Any], seed: int) -> Model:
    """A model of this config whose weights are drawn as transformers draws them; the same for the
    same seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = folder.weight_dtype(model)
    with tempfile.TemporaryDirectory(prefix="lighten-") as temporary:
        for name, content in folder.small_files(model, kind, **changes).items():
            (Path(temporary) / name).write_bytes(content)
        config = AutoConfig.from_pretrained(temporary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "student"))
        module: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tied = layers.aliases(module)
    state = {k: t.detach() for k, t in module.state_dict().items() if k not in tied}
    vectors = torch.float32 if model.kind == "gguf" else kind
    kinds = {k: kind if t.ndim > 1 else vectors for k, t in state.items()}
    entries = [Entry(k, kinds[k], tuple(t.shape)) for k, t in state.items()]
    return write(model, path, changes, entries, lambda name: state[name].to(kinds[name]))


def check_same(small: Model, window: Tensor, expected: Tensor, what: str) -> None:
    """Raise WrongUse where a written model computes something else than what it was made from.

    window: (1, length) token ids. expected: (length, width), what its head should be given.
    """
    found = next(Stream(small, window).through().outputs())
    apart = float((found - expected).norm() / expected.norm().clamp(min=1e-12))
    if not apart <= _NEAR:
        raise WrongUse(
            f"{small.config.model_type}: {what} makes a model that computes something else than"
            f" what it was taken from (off by {apart:.2g})",
            "this architecture is bound to its full size: name another model as the student",
        )
