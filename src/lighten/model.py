"""Open any language model: its config, its weights on disk, its skeleton, its layers.

Nothing is read before it is asked for. A Hugging Face folder (or hub id) and a GGUF file look the
same from here: state-dict names, and tensors as the transformers module holds them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lighten import checkpoint, layers
from lighten.errors import BadInput, WrongUse
from lighten.gguf_file import GgufFile
from lighten.tensors import LazyTensor, held
from lighten.types import Layer


@dataclass(frozen=True, eq=False)
class Model:
    """A model on disk. source: as the user wrote it. path: the folder or file.

    family: its key in `registry.families`, None where lighten knows no names abroad. gguf: the
    header of a GGUF file. notes: what the user should know about how it was opened. changed: the
    tensors that stand in the place of those on disk.
    """

    source: str
    path: Path
    kind: Literal["huggingface", "gguf"]
    config: Any
    family: str | None
    gguf: GgufFile | None = None
    trust_remote_code: bool = False
    _stored: Mapping[str, LazyTensor] = field(default_factory=dict, repr=False)
    changed: frozenset[str] = frozenset()

    @cached_property
    def _matched(self) -> checkpoint.Matched:
        return checkpoint.match(self)

    @property
    def tensors(self) -> Mapping[str, LazyTensor]:
        """State-dict name -> tensor on disk, tied ones once; raises BadInput if any is missing."""
        return self._matched.tensors

    @property
    def notes(self) -> tuple[str, ...]:
        """What was ignored or decided while the checkpoint was matched with the module."""
        return self._matched.notes

    @property
    def _plan(self) -> nn.Module:
        """A skeleton that stays on the meta device, for names, shapes and ties."""
        return self._matched.skeleton

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Prefixes of the blocks in order, such as `model.layers.0`."""
        return layers.find_blocks(self._plan)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Every matrix as (out, in): linears, embeddings, head. Runs the meta skeleton once."""
        return layers.find_layers(self._plan, self.blocks)

    @cached_property
    def others(self) -> tuple[str, ...]:
        """Parameters of two and more dimensions that are in no layer, such as stacked experts."""
        known = {layer.name for layer in self.layers}
        named = self._plan.named_parameters()
        return tuple(name for name, p in named if p.ndim > 1 and name not in known)

    def with_vectors(self, vectors: Mapping[str, Tensor]) -> Model:
        """The same model with other norms or biases, held in memory: name -> (width,)."""
        tensors = dict(self.tensors)
        for name, v in vectors.items():
            tensors[name] = held(v.cpu(), tensors[name])
        return self.with_tensors(tensors)

    def with_tensors(self, tensors: Mapping[str, LazyTensor]) -> Model:
        """The same names and shapes with other numbers in some of them."""
        others = {name for name, tensor in tensors.items() if tensor is not self.tensors[name]}
        new = replace(self, changed=self.changed | others)
        new.__dict__["_matched"] = replace(self._matched, tensors=tensors)
        return new

    def skeleton(self) -> nn.Module:
        """A new AutoModelForCausalLM on the meta device, eval, float32."""
        return checkpoint.skeleton(self, tied=self._matched.tied)

    def fill(
        self,
        module: nn.Module,
        prefix: str = "",
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        overrides: Mapping[str, Tensor] | None = None,
        skip: Collection[str] = (),
    ) -> None:
        """Give memory and numbers to `module`, the submodule `prefix` of a skeleton ("": all).

        Parameters come from disk as `dtype`, or from `overrides`: name -> (out, in) where the
        name is a layer's, else the parameter's shape. Buffers that are in no checkpoint (rotary
        frequencies) are computed, in their own dtype. skip: prefixes to leave on meta, for
        example `model.blocks`. Raises BadInput for NaN, WrongUse for an override of wrong shape.
        """
        tied, made = layers.aliases(self._plan), dict[str, nn.Parameter]()
        given = overrides or {}
        for path, child in module.named_modules():
            full = ".".join(p for p in (prefix, path) if p)
            if any(full == s or full.startswith(f"{s}.") for s in skip):
                continue
            checkpoint.compute_buffers(self._plan, full, child, device)
            for key, parameter in child._parameters.items():
                if parameter is None:
                    continue
                name = f"{full}.{key}" if full else key
                name = tied.get(name, name)
                if name not in made:
                    value = self._value(name, given.get(name), parameter.shape)
                    value = value.to(device=device, dtype=dtype)
                    made[name] = nn.Parameter(value, requires_grad=False)
                child._parameters[key] = made[name]
            for key, buffer in child._buffers.items():
                name = f"{full}.{key}" if full else key
                if buffer is not None and key not in child._non_persistent_buffers_set:
                    child._buffers[key] = self._load(name).to(device=device, dtype=buffer.dtype)

    def _value(self, name: str, given: Tensor | None, shape: torch.Size) -> Tensor:
        """The parameter `name` as its module holds it."""
        if given is None:
            return self._load(name)
        if name in self._transposed:
            given = given.T
        if given.shape != shape:
            raise WrongUse(f"override of `{name}` is {tuple(given.shape)}, not {tuple(shape)}")
        return given.detach().clone(memory_format=torch.contiguous_format)

    @cached_property
    def _transposed(self) -> frozenset[str]:
        return frozenset(layer.name for layer in self.layers if layer.transposed)

    def empty(self, module: nn.Module) -> None:
        """Give the memory of `module` back: its parameters and buffers are on meta again."""
        made: dict[int, nn.Parameter] = {}
        for child in module.modules():
            for key, p in child._parameters.items():
                if p is not None and not p.is_meta:
                    gone = torch.empty_like(p, device="meta")
                    made.setdefault(id(p), nn.Parameter(gone, requires_grad=False))
                    child._parameters[key] = made[id(p)]
            for key, b in child._buffers.items():
                if b is not None and not b.is_meta:
                    child._buffers[key] = torch.empty_like(b, device="meta")

    def _load(self, name: str) -> Tensor:
        """A tensor from disk, checked to be finite."""
        t = self.tensors[name].load()
        # one pass without a mask: any NaN or Inf survives a sum in float64, which cannot overflow
        total = (t if t.dtype.itemsize > 1 else t.float()).sum(dtype=torch.float64)
        if not bool(torch.isfinite(total)):
            bad = int((~torch.isfinite(t.float())).sum())
            raise BadInput(
                f"tensor `{name}` of {self.source} holds {bad} values that are NaN or infinite",
                "the model is damaged, or was trained or converted wrongly",
            )
        return t

    def weight(self, layer: Layer) -> Tensor:
        """(out, in) float32, in memory of its own; raises BadInput for NaN and Inf."""
        w = self._load(layer.name).float()
        return w.T.contiguous() if layer.transposed else w

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer that comes with the model; raises BadInput without one."""
        return checkpoint.tokenizer(self)

    @cached_property
    def digest(self) -> str:
        """sha256 in hex of names, shapes, types and sizes of all tensors, of 4 KiB at the start,
        middle and end of each, and of the config and tokenizer files (GGUF: the whole header).

        The same for a copy elsewhere. Cheap: it does not see a change between the samples.
        """
        return checkpoint.digest(self)

    @cached_property
    def nbytes(self) -> int:
        """Size of the weight files, in bytes."""
        files = {tensor.at[0] for tensor in self._stored.values()}
        return sum(file.stat().st_size for file in files)

    @cached_property
    def parameters(self) -> int:
        """How many weights, tied ones once."""
        return sum(p.numel() for p in self._plan.parameters())


def open_model(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> Model:
    """A model from a Hugging Face folder, a hub id `org/name` (downloaded) or a .gguf file.

    Raises BadInput if it is damaged, incomplete or holds only pickles, WrongUse if there is no
    such thing. Code that comes with a model runs only with trust_remote_code.
    """
    from lighten import sources

    path = sources.locate(str(source), revision)
    if path.is_file():
        file, arch, config = sources.open_gguf(path)
        model = Model(str(source), path, "gguf", config, arch, file, False, file.tensors)
    else:
        config, stored = sources.open_folder(path, trust_remote_code)
        family = sources.family(config)
        code = trust_remote_code
        model = Model(str(source), path, "huggingface", config, family, None, code, stored)
    len(model.tensors)  # an incomplete checkpoint is refused here, before any work
    return model
