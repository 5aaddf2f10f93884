"""A checkpoint and its module brought together: names, ties, shapes, buffers, tokenizer, digest."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lighten import layers
from lighten.containers import gguf_vocab
from lighten.errors import BadInput
from lighten.registry import families
from lighten.tensors import LazyTensor, read_bytes

if TYPE_CHECKING:
    from lighten.model import Model

_SAMPLE = 4096  # bytes


@dataclass(frozen=True)
class Matched:
    """The tensors that the module asks for, a skeleton on meta, and whether ties hold."""

    tensors: Mapping[str, LazyTensor]
    skeleton: nn.Module
    tied: bool
    notes: tuple[str, ...]


def skeleton(model: Model, *, tied: bool) -> nn.Module:
    """AutoModelForCausalLM on the meta device, eval, float32; sdpa, or eager where it has none."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)  # from_config writes the dtype into it
    if not tied:
        config.tie_word_embeddings = False
    error: Exception | None = None
    for attention in ("sdpa", "eager"):
        try:
            with torch.device("meta"):
                module: nn.Module = AutoModelForCausalLM.from_config(
                    config,
                    attn_implementation=attention,
                    dtype=torch.float32,
                    trust_remote_code=model.trust_remote_code,
                )
            return module.eval().requires_grad_(False)
        except Exception as raised:  # foreign configs and foreign code fail in many ways
            error = error or raised
    raise BadInput(
        f"transformers cannot build {model.source} ({model.config.model_type!r}): {error}",
        "is it a language model whose config is whole?",
    ) from error


def match(model: Model) -> Matched:
    """Give every parameter and persistent buffer its tensor; raises BadInput if one has none."""
    module = skeleton(model, tied=True)
    tied = layers.aliases(module)
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    if model.gguf is not None:
        found, extra = _from_gguf(model, module, wanted)
    else:
        found, extra = _from_folder(model, module, wanted)
    for name, first in tied.items():
        if name in found and first in found and not _equal(found[name], found[first]):
            # the config promises a tie that the file does not keep: the file is right
            apart = skeleton(model, tied=False)
            note = f"`{name}` and `{first}` differ in the file: not tied, whatever the config says"
            left = layers.aliases(apart)
            kept = {n: t for n, t in found.items() if n not in left}
            _check(model, kept, {n: s for n, s in wanted.items() if n not in left})
            model.config.tie_word_embeddings = False
            return Matched(kept, apart, False, (note, *_ignored(extra)))
        if name in found and first not in found:
            found[first] = replace(found[name], name=first)
        found.pop(name, None)
    _check(model, found, {n: s for n, s in wanted.items() if n not in tied})
    order = [name for name in wanted if name in found]
    return Matched({n: found[n] for n in order}, module, True, _ignored(extra))


def _ignored(extra: list[str]) -> tuple[str, ...]:
    if not extra:
        return ()
    some = ", ".join(f"`{n}`" for n in extra[:3]) + (", ..." if len(extra) > 3 else "")
    return (f"{len(extra)} tensors of the file are not in the module and were ignored: {some}",)


def _check(
    model: Model, found: Mapping[str, LazyTensor], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise BadInput for a parameter without a tensor, or with one of another shape."""
    missing = [name for name in wanted if name not in found]
    if missing:
        some = ", ".join(f"`{n}`" for n in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise BadInput(
            f"{model.source} lacks {len(missing)} of {len(wanted)} tensors of its module: {some}",
            "is the download complete, and the model one that writes text (a causal LM)? Names "
            "that transformers rewrites while loading (stacked experts) are not supported",
        )
    for name, shape in wanted.items():
        _check_shape(model, name, found[name].shape, shape)


def _check_shape(model: Model, name: str, shape: Any, wanted: Any) -> None:
    if shape != wanted:
        raise BadInput(
            f"tensor `{name}` of {model.source} is {shape}, but the config makes it {wanted}",
            "config and weights are not of one model",
        )


def _equal(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors on disk hold the same numbers; compared piece by piece."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    step = max(1, (1 << 22) // max(a.numel // max(a.shape[0], 1), 1))
    return all(
        torch.equal(a.rows(i, i + step), b.rows(i, i + step)) for i in range(0, a.shape[0], step)
    )


def _from_folder(
    model: Model, module: nn.Module, wanted: Mapping[str, Any]
) -> tuple[dict[str, LazyTensor], list[str]]:
    """(tensors by the module's names, names that it does not have).

    A checkpoint of the bare base model lacks its prefix, or has one too many.
    """
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    found: dict[str, LazyTensor] = {}
    extra = []
    for name, tensor in model._stored.items():
        names = (name, prefix + name, name.removeprefix(prefix))
        here = next((n for n in names if n in wanted), None)
        if here is None or here in found:
            extra.append(name)
        else:
            found[here] = replace(tensor, name=here)
    return found, extra


def _from_gguf(
    model: Model, module: nn.Module, wanted: Mapping[str, Any]
) -> tuple[dict[str, LazyTensor], list[str]]:
    """As _from_folder: names, row order, offset and orientation as the module has them."""
    family = families[str(model.family)]
    blocks = len(layers.find_blocks(module))
    flat = {f"{n}.weight" for n, _, transposed in layers.matrices(module) if transposed}
    used = set(family.extra_tensors(model.config))
    found: dict[str, LazyTensor] = {}
    extra = []
    for there, tensor in model._stored.items():
        name = family.hf_name(there, blocks)
        if name is None or name not in wanted:
            if there not in used:
                extra.append(there)
            continue
        # before row_order, which would believe any number of heads
        _check_shape(model, name, tensor.shape[:: -1 if name in flat else 1], wanted[name])
        order = family.row_order(name, model.config)
        found[name] = _as_module(name, tensor, order, family.offset(name), name in flat)
    return found, extra


def _as_module(
    name: str, tensor: LazyTensor, order: Tensor | None, offset: float, transposed: bool
) -> LazyTensor:
    """A GGUF tensor as the transformers module holds it."""
    read: Callable[[int, int], Tensor] = tensor.read
    if order is not None:
        back = torch.argsort(order)

        def unordered(a: int, b: int) -> Tensor:
            return tensor.load()[back[a:b]]

        read = unordered
    elif offset:

        def shifted(a: int, b: int) -> Tensor:
            return tensor.rows(a, b).float() - offset

        read = shifted
    elif transposed and len(tensor.shape) == 2:

        def turned(a: int, b: int) -> Tensor:
            return tensor.load().T[a:b].contiguous()

        shape = tensor.shape[::-1]
        return replace(tensor, name=name, shape=shape, read=turned)
    dtype = torch.float32 if offset else tensor.dtype
    return replace(tensor, name=name, dtype=dtype, read=read)


def compute_buffers(plan: nn.Module, path: str, child: nn.Module, device: Any) -> None:
    """Give numbers to the buffers of `child` that no checkpoint holds; raises BadInput.

    transformers 5 computes them in `_init_weights(module)`, which also draws new parameters: so
    this comes before parameters are filled, while those are still on meta.
    """
    from transformers import PreTrainedModel

    buffers = {n: child._buffers[n] for n in child._non_persistent_buffers_set}
    fresh = {n: torch.empty_like(b, device=device) for n, b in buffers.items() if b is not None}
    if not fresh:
        return
    owners = [plan, *(plan.get_submodule(path[:i]) for i, c in enumerate(path + ".") if c == ".")]
    owner = [m for m in owners if isinstance(m, PreTrainedModel)][-1]
    for n, buffer in fresh.items():
        child._buffers[n] = buffer.fill_(_unset(buffer.dtype))
    kept = {k: p for k, p in child._parameters.items() if p is not None}
    with torch.no_grad():
        for k, p in kept.items():
            child._parameters[k] = nn.Parameter(p.detach().to("meta"), requires_grad=False)
        owner._init_weights(child)
    child._parameters.update(kept)
    for n, b in fresh.items():
        unset = torch.isnan(b) if b.is_floating_point() else torch.eq(b, _unset(b.dtype))
        if child._buffers[n] is b and b.dtype != torch.bool and bool(unset.any()):
            raise BadInput(
                f"buffer `{path}.{n}` is in no checkpoint and transformers does not compute it",
                "this architecture cannot be opened block by block",
            )


def _unset(dtype: torch.dtype) -> float | int | bool:
    """A value that no computed buffer holds."""
    if dtype == torch.bool:
        return False
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


def tokenizer(model: Model) -> Any:
    """The transformers tokenizer of a folder, or the one that a GGUF file describes."""
    from transformers import AutoTokenizer

    gguf = model.path.name if model.kind == "gguf" else None
    folder = str(model.path.parent if gguf else model.path)
    try:
        found = AutoTokenizer.from_pretrained(
            folder, gguf_file=gguf, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # damaged tokenizer files fail in many ways
        raise BadInput(
            f"transformers cannot read the tokenizer of {model.source}: {error}",
            "a model folder needs tokenizer.json (or tokenizer.model) beside its weights",
        ) from error
    if model.gguf is not None and model.gguf.metadata.get("tokenizer.ggml.model") == "gpt2":
        gguf_vocab.restore_pre_tokenizer(found, str(model.gguf.metadata.get("tokenizer.ggml.pre")))
    return found


def digest(model: Model) -> str:
    """See Model.digest."""
    sha = hashlib.sha256()
    if model.gguf is not None:
        sha.update(read_bytes(model.path, 0, model.gguf.data_start).numpy().tobytes())
    else:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
            file = model.path / name
            sha.update(f"{name}\n".encode())
            sha.update(file.read_bytes() if file.is_file() else b"")
    for name, t in sorted(model._stored.items()):
        sha.update(json.dumps([name, t.shape, t.stored, t.nbytes]).encode())
        size = min(_SAMPLE, t.nbytes)
        for start in sorted({0, (t.nbytes - size) // 2, t.nbytes - size}):
            sha.update(read_bytes(t.at[0], t.at[1] + start, size).numpy().tobytes())
    files = sorted({t.at[0] for t in model._stored.values()})
    sha.update(json.dumps([file.stat().st_size for file in files]).encode())
    return sha.hexdigest()
