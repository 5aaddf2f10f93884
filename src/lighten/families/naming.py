"""What one architecture is called and stored as in GGUF: `Family`, the entry of the registry.

A weight keeps its Hugging Face name everywhere in lighten; only a reader or writer of another
file layout asks its family for the name, the row order and the offset there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

Entry = tuple[Any, Any]
"""A metadata value and its gguf.GGUFValueType (lists: the type of their elements)."""


def _no_rows(name: str, config: Any) -> Tensor | None:
    return None


def _no_offset(name: str) -> float:
    return 0.0


def _no_tensors(config: Any) -> dict[str, Tensor]:
    return {}


def _always(metadata: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True)
class Family:
    """Facts about one architecture, plain values and functions of its config.

    model_type: its name in transformers. gguf_arch: `general.architecture`. outer: modules outside
    the blocks. blocks: the name that block numbers follow. inner: modules inside a block.
    metadata(config): every hyper-parameter that llama.cpp needs, without `general.*` and the
    tokenizer. config(metadata, tensors): the inverse, keyword arguments of the transformers config;
    `tensors` maps GGUF names to objects with `.shape` and `.load()`. refuses(config): why
    llama.cpp would compute something else, or None. notes(config): what a reader of the file
    should know. claims(metadata): whether a file of this gguf_arch is of this family.
    row_order(name, config): rows such that gguf = hf[order]; None: as they are.
    offset(name): gguf = hf + offset. extra_tensors(config): what GGUF stores besides.
    scalable: modules of a block that write channels, each with all that read these, where a factor
    on the one and its inverse on the others cancel.
    """

    model_type: str
    gguf_arch: str
    outer: tuple[str, ...]
    blocks: str
    inner: tuple[str, ...]
    metadata: Callable[[Any], dict[str, Entry]]
    config: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    refuses: Callable[[Any], str | None]
    notes: Callable[[Any], tuple[str, ...]] = lambda config: ()
    claims: Callable[[Mapping[str, Any]], bool] = _always
    row_order: Callable[[str, Any], Tensor | None] = _no_rows
    offset: Callable[[str], float] = _no_offset
    extra_tensors: Callable[[Any], dict[str, Tensor]] = _no_tensors
    scalable: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def gguf_name(self, hf_name: str, n_blocks: int) -> str | None:
        """The GGUF name of a state-dict name, `.weight` or `.bias` included; None: has none."""
        return _names(self, n_blocks).get(hf_name)

    def hf_name(self, gguf_name: str, n_blocks: int) -> str | None:
        """The inverse of gguf_name."""
        return _names_back(self, n_blocks).get(gguf_name)


@lru_cache(maxsize=32)
def _names(family: Family, n_blocks: int) -> dict[str, str]:
    """Every state-dict name -> GGUF name. *Source:* the tensor name map of the gguf package."""
    import gguf

    (arch,) = (k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == family.gguf_arch)
    known = gguf.get_tensor_name_map(arch, n_blocks)
    modules = [*family.outer]
    modules += [f"{family.blocks}.{i}.{m}" for i in range(n_blocks) for m in family.inner]
    names: dict[str, str] = {}
    for module in modules:
        there = known.get_name(module)
        if there is not None:
            names |= {f"{module}.{part}": f"{there}.{part}" for part in ("weight", "bias")}
    return names


@lru_cache(maxsize=32)
def _names_back(family: Family, n_blocks: int) -> dict[str, str]:
    return {there: here for here, there in _names(family, n_blocks).items()}
