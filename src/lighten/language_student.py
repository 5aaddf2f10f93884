"""A language model that teaches, and one whose weights are learned in their formats.

Blocks are gradient checkpoints where memory is short (lighten.kept_activations): of each only its
input is kept, and it runs again when its gradient is asked for. So memory is the weights, what is
trained of them three times over (AdamW), and at least one block's activations.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from lighten.kept_activations import KeptActivations
from lighten.learned_weight import LearnedVector, LearnedWeight, learnable
from lighten.model import Model
from lighten.solve import Dense
from lighten.types import Compressed


class Recomputed(nn.Module):
    """Stands where a block stood: runs it, and again when gradients are wanted and it does not
    keep what these need."""

    def __init__(self, block: nn.Module, index: int, kept: KeptActivations) -> None:
        super().__init__()
        self.block, self.index, self.kept = block, index, kept

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask a block for its attention type and the like
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._run((args, kwargs))
        if self.kept.count is None:
            return self.kept.measured(lambda: self._run((args, kwargs)), args[0].device)
        if self.index < self.kept.count:
            return self._run((args, kwargs))
        return checkpoint(self._run, (args, kwargs), use_reentrant=False)

    def _run(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        return self.block(*call[0], **call[1])


class LanguageModel(nn.Module):
    """A language model as the loop calls it: token ids (batch, length) -> what the head is given.

    The transformers module is held beside the module tree: training mode, which would switch its
    dropout on, never reaches it, and the state dict is what learns and nothing else.

    ends: one for each block, called with the hidden states (batch, length, width) that leave it.
    """

    def __init__(
        self, model: Model, weights: Mapping[str, Compressed], device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        module = model.skeleton()
        model.fill(module, device=device, overrides=Dense(weights))
        names = [layer.name for layer in model.layers if layer.kind in ("head", "embedding+head")]
        self._held = (module, module.get_submodule(names[0].rpartition(".")[0]))
        self.ends = nn.ModuleList(nn.Identity() for _ in model.blocks)
        for name, end in zip(model.blocks, self.ends, strict=True):
            module.get_submodule(name).register_forward_hook(_leaving(end))

    @property
    def places(self) -> tuple[str, ...]:
        """Where it can be watched (lighten.watch), in order of depth."""
        return tuple(f"ends.{i}" for i in range(len(self.ends)))

    @property
    def module(self) -> nn.Module:
        return self._held[0]

    def forward(self, ids: Tensor) -> Tensor:
        base = getattr(self.module, "base_model", self.module)
        hidden: Tensor = base(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    def head(self) -> tuple[Tensor, Tensor | None]:
        """The head's weight (vocabulary, width), decoded now, and its bias."""
        weight: Tensor = self._held[1].weight  # type: ignore[assignment]
        bias: Tensor | None = getattr(self.module.get_output_embeddings(), "bias", None)  # type: ignore[operator]
        return weight, bias


class LanguageStudent(LanguageModel):
    """`model` with `weights` in place of its own, those that have a grid to learn parametrized.

    mode: see LearnedWeight. vectors: norms and biases, which files store in full, learn as well.
    """

    def __init__(
        self,
        model: Model,
        weights: Mapping[str, Compressed],
        *,
        mode: str = "scales",
        vectors: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(model, weights, device)
        layers = {layer.name: layer for layer in model.layers}
        self.vectors = _vectors(self.module) if vectors else {}
        for name, vector in self.vectors.items():
            attach(self.module, name, vector)
        self.learned: dict[str, LearnedWeight] = {}
        for name in weights:
            weight = weights[name]
            if learnable(weight):
                original = model.weight(layers[name]) if mode == "all" else None
                made = LearnedWeight(weight, mode, original, layers[name].transposed).to(device)
                attach(self.module, name, made)
                self.learned[name] = made
        insert(self.module, model.blocks, self)
        trained: dict[str, nn.Parameter] = {}
        for name, each in (*self.learned.items(), *self.vectors.items()):
            trained |= {f"{part}@{name}": p for part, p in each.named_parameters()}
        for name, p in trained.items():
            self.register_parameter(name.replace(".", "/"), p)

    def freeze(self) -> tuple[dict[str, Compressed], dict[str, Tensor]]:
        """The learned weights in their bytes, and the learned vectors by their names."""
        vectors = {name: each.freeze() for name, each in self.vectors.items()}
        return {name: each.freeze() for name, each in self.learned.items()}, vectors


def attach(module: nn.Module, name: str, learned: nn.Module) -> None:
    """Parametrize the parameter `name`; the parameter of old keeps no memory."""
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    parametrize.register_parametrization(owner, key, learned, unsafe=True)
    original: nn.Parameter = owner.parametrizations[key].original  # type: ignore[union-attr, assignment, index]
    original.requires_grad_(False)
    original.data = original.data.new_empty(0)


def insert(module: nn.Module, blocks: tuple[str, ...], student: nn.Module) -> None:
    """Put a Recomputed in the place of every block. student: whose parameters learn."""

    def owed() -> int:  # a gradient, and AdamW's two moments
        return 3 * sum(p.numel() * p.element_size() for p in student.parameters())

    kept = KeptActivations(len(blocks), owed)
    siblings: Any = module.get_submodule(blocks[0].rpartition(".")[0])
    for i, block in enumerate(list(siblings)):
        siblings[i] = Recomputed(block, i, kept)
        # what looks at what leaves the block does so once, not again when it is recomputed
        siblings[i]._forward_hooks, block._forward_hooks = block._forward_hooks, OrderedDict()


def _leaving(end: nn.Module) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that shows `end` the hidden states that a block returns."""

    def show(block: nn.Module, inputs: Any, output: Any) -> None:
        end(output[0] if isinstance(output, tuple) else output)

    return show


def _vectors(module: nn.Module) -> dict[str, LearnedVector]:
    """Norms and biases: parameters of one dimension, in their own names."""
    found = {name: p for name, p in module.named_parameters() if p.dim() == 1}
    return {name: LearnedVector(p) for name, p in found.items()}
