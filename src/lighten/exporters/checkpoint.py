"""A network as safetensors and a JSON beside it: what lighten itself reads, with nothing unpacked.

    model.safetensors   every tensor of the state dict by its name; a compressed weight as its
                        parts, `name:part` (codes, scales, and of sparse weights the mask)
    lighten.json        specs and shapes of compressed weights, quantizers of edges, tied names,
                        kept units, how the network is built, where it came from

Sparse weights are a bitmask and what stays: no runtime computes with that, but it is the smallest
file, and reading gives plain dense tensors. No pickle anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lighten.containers import folder
from lighten.containers.safetensors import DTYPES, SHARD_BYTES, Entry, Lazy, Shards, Tensors
from lighten.errors import BadInput, WrongUse
from lighten.network import Network, described_inputs, inputs_of
from lighten.quantized import Edge, Quantized
from lighten.registry import exporters
from lighten.sparse import format_of, pack_mask, unpack_mask
from lighten.tensors import safetensors_folder
from lighten.types import Compressed, Spec

ABOUT = "lighten.json"
VERSION = 1


@dataclass(frozen=True)
class Built:
    """How a network was built from the original. inputs: zeros in the shapes of its examples.

    graph: it had to become a graph when it was narrowed. folded: batch norms are folded, and what
    is rounded has a bias.
    """

    inputs: tuple[Tensor, ...] = ()
    graph: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds. tensors: state-dict names -> numbers, decoded when asked for.

    weights: the compressed ones as they are. kept: axis -> units of the original that stayed.
    """

    tensors: Mapping[str, Tensor]
    weights: Mapping[str, Compressed]
    edges: Mapping[str, Edge]
    kept: Mapping[str, list[int]]
    provenance: Mapping[str, Any]
    built: Built = field(default_factory=Built)


@dataclass(frozen=True)
class Checkpoint:
    """The exporter. kept (axis -> unit numbers), provenance (JSON) and how it is built go into the
    file with it, the shapes of its inputs without being told."""

    name: str = "checkpoint"
    holds: str = "networks"
    suffix: str = ""
    kept: Mapping[str, Sequence[int]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    built: Built = field(default_factory=Built)
    shard_bytes: int = SHARD_BYTES

    def refuses(self, model: Any) -> str | None:
        if not isinstance(model, Network | Quantized):
            return (
                "checkpoints are of networks given as package.module:factory;"
                " language models go to gguf, compressed_tensors or huggingface"
            )
        for name, t in _network(model).module.state_dict().items():
            if not isinstance(t, Tensor) or t.dtype not in DTYPES:
                return f"`{name}` is {getattr(t, 'dtype', type(t).__name__)}: not stored here"
            if t.is_meta:
                return f"`{name}` has no numbers: it is on the meta device"
            if ":" in name:
                return f"`{name}` has a colon in its name"
        return None

    def notes(self, network: Any) -> tuple[str, ...]:
        weights = network.weights.values() if isinstance(network, Quantized) else ()
        if any(w.spec.sparsity for w in weights):
            return ("sparse weights are smaller on disk; runtimes compute with their zeros",)
        return ()

    def nbytes(self, network: Any) -> int:
        files, shards, _ = self._layout(network)
        return folder.nbytes(files, shards)

    def write(self, network: Any, path: Path) -> None:
        files, shards, tensors = self._layout(network)
        folder.write_folder(path, files, shards, tensors.__getitem__)

    def read(self, path: Path) -> Mapping[str, Tensor]:
        return self.open(path).tensors

    def open(self, path: Path) -> Stored:
        """All that is in the checkpoint at `path`; raises BadInput where it is none or damaged."""
        body = _about(path)
        there = safetensors_folder(path)
        try:
            specs = {n: Spec.parse(w["spec"]) for n, w in body["weights"].items()}
            shapes = {n: tuple(int(s) for s in w["shape"]) for n, w in body["weights"].items()}
            edges = {n: Edge(**e) for n, e in body["edges"].items()}
            tied = {str(n): str(first) for n, first in body["tied"].items()}
            kept = {str(n): _unpacked(units) for n, units in body["kept"].items()}
            provenance = dict(body["provenance"])
            how = body.get("built", {"inputs": []})  # older ones do not say
            built = Built(inputs_of(how["inputs"]), bool(how.get("graph")), bool(how.get("folded")))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from error
        names: dict[str, list[str]] = {n: [] for n in specs}
        for full in there:
            name, colon, part = full.partition(":")
            if colon and name not in names:
                raise _damaged(path, f"it does not say what `{full}` is")
            if colon:
                names[name].append(part)
        lost = [n for n, first in tied.items() if first not in there and first not in specs]
        lost += [n for n, parts in names.items() if not parts or len(shapes[n]) < 2]
        if lost:
            raise _damaged(path, f"`{lost[0]}` is not in it as it says")

        def weight(name: str) -> Compressed:
            parts = {p: there[f"{name}:{p}"].load() for p in names[name]}
            shape = (shapes[name][0], torch.Size(shapes[name][1:]).numel())
            return Compressed(specs[name], shape, format_of(specs[name]), parts)

        def load(name: str) -> Tensor:
            first = tied.get(name, name)
            if first in specs:
                try:
                    return weight(first).dense().reshape(shapes[first])
                except (KeyError, RuntimeError) as error:
                    raise _damaged(path, f"the parts of `{first}`: {error}") from error
            return there[first].load()

        plain = [n for n in there if ":" not in n]
        order = [str(n) for n in body.get("order", [])]
        found = {*plain, *specs, *tied}
        if set(order) != found:
            raise _damaged(path, "its list of tensors is another")
        return Stored(Tensors(order, load), Lazy(specs, weight), edges, kept, provenance, built)

    def _layout(self, network: Any) -> tuple[dict[str, bytes], Shards, dict[str, Tensor]]:
        """Small files, tensors as announced, and the tensors by name."""
        why = self.refuses(network)
        if why is not None:
            raise WrongUse(f"this cannot be written as a checkpoint: {why}")
        weights = network.weights if isinstance(network, Quantized) else {}
        edges = network.edges if isinstance(network, Quantized) else {}
        state = _network(network).module.state_dict()
        tensors: dict[str, Tensor] = {}
        tied = _tied(state, weights)
        for name, t in state.items():
            if name in tied:
                continue
            if name in weights:
                for part, value in sorted(weights[name].parts.items()):
                    tensors[f"{name}:{part}"] = value
            else:
                tensors[name] = t
        body = {
            "lighten": VERSION,
            "weights": {
                n: {"spec": str(w.spec), "shape": list(state[n].shape)}
                for n, w in sorted(weights.items())
            },
            "edges": {n: asdict(e) for n, e in sorted(edges.items())},
            "tied": tied,
            "kept": {n: _packed(units) for n, units in self.kept.items()},
            "built": {
                "inputs": described_inputs(_network(network).inputs),
                "graph": self.built.graph,
                "folded": self.built.folded,
            },
            "provenance": {"source": _network(network).source, **self.provenance},
            "order": list(state),
        }
        text = (json.dumps(body, indent=1) + "\n").encode()
        entries = [Entry(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]
        return {ABOUT: text}, Shards.of(entries, self.shard_bytes), tensors


def _network(model: Network | Quantized) -> Network:
    return model.network if isinstance(model, Quantized) else model


def _packed(units: Sequence[int]) -> str:
    """A bit for each unit, the first one the lowest, in hex: no longer the fewer are kept.

    >>> _packed([0, 2, 5]), _unpacked("25")
    ('25', [0, 2, 5])
    """
    kept = torch.zeros(1, max(units, default=-1) + 1, dtype=torch.bool)
    kept[0, list(units)] = True
    return bytes(pack_mask(kept)[0].tolist()).hex()


def _unpacked(units: str | list[int]) -> list[int]:
    if not isinstance(units, str):  # as earlier ones have it
        return [int(unit) for unit in units]
    packed = torch.tensor([list(bytes.fromhex(units))], dtype=torch.uint8)
    found: list[int] = unpack_mask(packed, packed.numel() * 8)[0].nonzero().flatten().tolist()
    return found


def _tied(state: Mapping[str, Tensor], weights: Mapping[str, Compressed]) -> dict[str, str]:
    """Names whose tensor is stored under another name: its compressed, else its first one."""
    first: dict[tuple[Any, ...], str] = {}
    found = {}
    for name in sorted(state, key=lambda n: n not in weights):
        t = state[name]
        key = (t.data_ptr(), t.dtype, tuple(t.shape), t.stride())
        if t.numel() and first.setdefault(key, name) != name and name not in weights:
            found[name] = first[key]
    return found


def _about(path: Path) -> dict[str, Any]:
    try:
        body = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"`{path}` is no checkpoint of lighten: {ABOUT}: {error}",
            "give the folder that `--export checkpoint` wrote",
        ) from error
    if not isinstance(body, dict) or body.get("lighten") != VERSION:
        raise _damaged(path, f"its version is not {VERSION}")
    return body


def _damaged(path: Path, what: str) -> BadInput:
    return BadInput(f"the checkpoint `{path}` is damaged: {what}", "write it again")


exporters("checkpoint")(Checkpoint())
