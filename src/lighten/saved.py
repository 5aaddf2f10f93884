"""A shrunk network on disk: its weights, and which units were kept; no code and no pickle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lighten.containers.output import whole_folder
from lighten.coupling.axes import Couplings, Keep, analyse, stored_names
from lighten.depth import Blocks, take_blocks
from lighten.errors import BadInput
from lighten.network import Network, described_inputs, inputs_of
from lighten.pretrained import is_pretrained
from lighten.shrink import graph_module, is_graph, own_module

WEIGHTS = "model.safetensors"
KEPT = "kept.json"


def save(
    network: Network,
    folder: Path,
    couplings: Couplings | None,
    keep: Keep,
    blocks: Blocks | None = None,
) -> None:
    """Write a shrunk network: `load` builds it again from the factory of the whole one.

    blocks: of lists that lost some, those that stayed. couplings and keep: what it was shrunk by
    after that, None and empty where it was not. A transformers model whose configuration can say
    the shape is written in its own form, so that plain `from_pretrained` builds it too.
    """
    if couplings is not None:
        couplings.check(keep)
    body = {
        "lighten": 1,
        "blocks": {name: list(kept) for name, kept in sorted((blocks or {}).items())},
        "keep": {name: kept.tolist() for name, kept in sorted(keep.items())},
        "inputs": described_inputs(network.inputs),
        "graph": is_graph(network.module),
        "digest": network.digest,
    }
    with whole_folder(Path(folder)) as part:
        module: Any = network.module
        if is_pretrained(module):
            module.save_pretrained(part)
        else:
            _write_weights(module, part / WEIGHTS)
        (part / KEPT).write_text(json.dumps(body) + "\n", encoding="utf-8")


def _write_weights(module: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    first = stored_names(module)
    state = module.state_dict()
    save_file(
        {
            k: t.detach().cpu().clone().contiguous()
            for k, t in state.items()
            if first.get(k, k) == k
        },
        path,
    )


def load(factory: Callable[[], nn.Module], folder: Path) -> nn.Module:
    """The module that `save` wrote, in evaluation mode. factory: makes the whole one, any weights.

    Raises BadInput where the folder is damaged or belongs to another network.
    """
    folder = Path(folder)
    blocks, keep, inputs, graph, digest = _read(folder / KEPT)
    module = narrowed(Network.of(factory(), inputs), keep, graph, folder, blocks).module
    if (folder / "config.json").is_file():
        kind: Any = type(module)
        module = kind.from_pretrained(folder, local_files_only=True)
    else:
        fill(module, _weights(folder / WEIGHTS), folder)
    if Network(module, inputs).digest != digest:
        raise BadInput(f"the weights in `{folder}` are not those that were saved", "copy it again")
    return module.eval()


def narrowed(
    whole: Network, keep: Keep, graph: bool, folder: Path, blocks: Blocks | None = None
) -> Network:
    """The network with these blocks and units left, its weights not compensated. graph: as a graph.

    folder: where it is said what stays; raises BadInput where that is of another network. `whole`
    loses its blocks.
    """
    try:
        take_blocks(whole.module, blocks or {})
        couplings = analyse(whole) if keep else None
        if couplings is not None:
            couplings.check(keep)
    except Exception as error:
        raise BadInput(
            f"`{folder}` was not made from this network: {error}",
            "give the factory of the network that was shrunk",
        ) from error
    build = graph_module if graph else own_module
    return whole if couplings is None else build(whole, couplings, keep)


def kept(folder: Path) -> tuple[dict[str, list[int]], Keep]:
    """Blocks and units that a folder's network has of the whole one; raises BadInput."""
    blocks, keep, *_ = _read(Path(folder) / KEPT)
    return blocks, keep


def _weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"`{path}` cannot be read: {error}", "copy it again") from error
    return found


def fill(module: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Put the tensors of `folder` into the module; raises BadInput where they are not all its own.

    Those that are tied are stored once, and added to `state`.
    """
    own = module.state_dict()
    for name, first in stored_names(module).items():
        if name in own and name not in state and first in state:
            state[name] = state[first]
    for name, t in own.items():
        if name in state and state[name].shape != t.shape:
            raise BadInput(
                f"`{name}` is {tuple(state[name].shape)} in `{folder}` and {tuple(t.shape)} here",
                "give the factory of the network that was shrunk",
            )
    missing = [n for n in own if n not in state]
    foreign = [n for n in state if n not in own]
    if missing or foreign:
        raise BadInput(
            f"`{folder}` and the network differ in `{(missing + foreign)[0]}`",
            "give the factory of the network that was shrunk",
        )
    module.load_state_dict(state, strict=False)


def _read(path: Path) -> tuple[dict[str, list[int]], Keep, tuple[Tensor, ...], bool, str]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        keep = {str(k): torch.tensor(v, dtype=torch.int64) for k, v in body["keep"].items()}
        blocks = {str(k): [int(i) for i in v] for k, v in body.get("blocks", {}).items()}
        return blocks, keep, inputs_of(body["inputs"]), bool(body["graph"]), str(body["digest"])
    except OSError as error:
        raise BadInput(f"`{path}` cannot be read: {error}", "a folder that `save` wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise BadInput(f"`{path}` is damaged: {type(error).__name__}: {error}") from error
