"""Checkpoints of a training: safetensors that are whole or absent, and how to go on from the last.

    request.json                what was asked for; another request is refused
    step-<n>.safetensors        all that step n + 1 depends on, and facts as JSON in its header
    best-<n>.safetensors        the student as it was best on held-out data
    history.jsonl               a row for every look at the losses
    .partial/                   what is being written

A state is in place before the one before it goes, so a kill at any moment leaves one to go on from.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lighten.atomic import JSON, as_line, dump, place, read_lines, sync, write_text
from lighten.errors import BadInput, ChangedRequest, WrongUse
from lighten.sharding import gathered, share_of

REQUEST, HISTORY, PARTIAL = "request.json", "history.jsonl", ".partial"


class Checkpoints:
    """The folder of one training."""

    def __init__(self, folder: Path, request: Mapping[str, JSON]) -> None:
        """Raises ChangedRequest where the folder holds another training, WrongUse, BadInput."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WrongUse(f"cannot make {folder}: {error.strerror}", "another folder") from error
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        asked = json.loads(dump(dict(request)))
        if (folder / REQUEST).exists():
            try:
                before = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
                changed = [
                    f"{k}: {before.get(k, 'unset')} -> {asked.get(k, 'unset')}"
                    for k in sorted(before.keys() | asked.keys())
                    if before.get(k) != asked.get(k)
                ]
            except (ValueError, AttributeError) as error:
                raise BadInput(f"{folder / REQUEST} is damaged", f"delete {folder}") from error
            if changed:
                raise ChangedRequest(
                    f"{folder} was begun for another training",
                    f"{'; '.join(changed)}. Ask for the same again to go on, or use another folder",
                )
        else:
            self._place(REQUEST, lambda path: write_text(path, dump(asked)))

    # -- states --------------------------------------------------------------------------------
    def last(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, facts) of the last state, None where there is none yet; raises BadInput."""
        names = self._names("step")
        return _read(self.folder / names[-1]) if names else None

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, JSON]) -> None:
        """Put the state after `step` in place of the one before; raises NoRoom."""
        name = f"step-{step}.safetensors"
        self._write(name, tensors, facts)
        best = f"best-{facts.get('best_step')}.safetensors"
        for old in (*self._names("step"), *self._names("best")):
            if old not in (name, best):
                (self.folder / old).unlink()

    def save_best(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the student's state; the one before stays until a state that names this is there."""
        self._write(f"best-{step}.safetensors", tensors, {})

    def best(self, step: int) -> dict[str, Tensor]:
        """The student's state as it was best; raises BadInput."""
        return _read(self.folder / f"best-{step}.safetensors")[0]

    # -- history -------------------------------------------------------------------------------
    def rows(self, step: int) -> list[dict[str, Any]]:
        """The rows up to `step`; later ones, of steps that will be made again, are dropped."""
        path = self.folder / HISTORY
        kept = [row for row in read_lines(path) if row.get("step", step + 1) <= step]
        self._place(HISTORY, lambda p: p.write_bytes(b"".join(as_line(row) for row in kept)))
        return kept

    def append(self, row: Mapping[str, JSON]) -> None:
        """One more row; on the disk once `sync` was called."""
        with open(self.folder / HISTORY, "ab") as file:
            file.write(as_line(row))

    def sync(self) -> None:
        """Wait until the rows are on the disk."""
        if (self.folder / HISTORY).exists():
            sync(self.folder / HISTORY)

    # -- files ---------------------------------------------------------------------------------
    def _names(self, kind: str) -> list[str]:
        """Files of a kind, the latest last."""
        found = {}
        for path in self.folder.iterdir():
            if match := re.fullmatch(rf"{kind}-(\d+)\.safetensors", path.name):
                found[int(match[1])] = path.name
        return [found[step] for step in sorted(found)]

    def _write(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, JSON]) -> None:
        from safetensors.torch import save_file

        own = {k: _apart(v) for k, v in tensors.items()}
        header = {"facts": json.dumps(dict(facts))}
        self._place(name, lambda path: save_file(own, path, metadata=header))

    def _place(self, name: str, write: Any) -> None:
        place(self.folder / name, self.folder / PARTIAL, write)


def remove_states(folder: Path) -> None:
    """Remove the states of a training whose result is stored elsewhere; its history stays."""
    for path in (*folder.glob("step-*.safetensors"), *folder.glob("best-*.safetensors")):
        path.unlink()


def _apart(tensor: Tensor) -> Tensor:
    """A tensor as safetensors wants it: on the CPU, contiguous, memory of its own."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise BadInput(
            f"{path} cannot be read: {error}", f"delete {path.parent} to begin again"
        ) from error


# -- what lives in a training, as tensors and JSON -------------------------------------------------
def optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]
) -> dict[str, Tensor]:
    """`<parameter>/<key>` -> what the optimizer remembers of it."""
    return {
        f"{names[parameter]}/{key}": gathered(value)
        for parameter, state in optimizer.state.items()
        if isinstance(parameter, nn.Parameter)
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, str],
    tensors: Mapping[str, Tensor],
) -> None:
    """The inverse of optimizer_state."""
    found = {name: parameter for parameter, name in names.items()}
    fused = {p for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    for key, value in tensors.items():
        name, _, part = key.rpartition("/")
        parameter = found[name]
        if value.shape == parameter.shape:  # laid out in memory as the parameter is
            like = torch.empty_like(parameter, dtype=value.dtype)
            value = like.copy_(share_of(value, parameter))
        elif parameter in fused:  # such a step counts on the device
            value = value.to(parameter.device)
        optimizer.state[parameter][part] = value


def split_state(value: Any, name: str) -> tuple[JSON, dict[str, Tensor]]:
    """Any state_dict as JSON and tensors: a tensor becomes {"tensor": its name}."""
    if isinstance(value, Tensor):
        return {"tensor": name}, {name: value}
    tensors: dict[str, Tensor] = {}
    if isinstance(value, Mapping):
        plain: Any = {}
        for key, inner in value.items():
            plain[str(key)], more = split_state(inner, f"{name}/{key}")
            tensors |= more
        return {"mapping": plain}, tensors
    if isinstance(value, list | tuple):
        plain = []
        for i, inner in enumerate(value):
            part, more = split_state(inner, f"{name}/{i}")
            plain.append(part)
            tensors |= more
        return plain, tensors
    return value, tensors


def join_state(plain: JSON, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of split_state (tuples come back as lists, keys as text)."""
    if isinstance(plain, list):
        return [join_state(inner, tensors) for inner in plain]
    if isinstance(plain, dict) and "tensor" in plain:
        return tensors[plain["tensor"]]
    if isinstance(plain, dict):
        return {key: join_state(inner, tensors) for key, inner in plain["mapping"].items()}
    return plain
