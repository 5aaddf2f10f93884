"""Where a model comes from: a folder, the hub, a GGUF file; and its config."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lighten.errors import BadInput, WrongUse
from lighten.gguf_file import GgufFile, read_gguf
from lighten.registry import families
from lighten.tensors import LazyTensor, safetensors_folder

_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]  # no pickles
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(source: str, revision: str | None) -> Path:
    """The folder or GGUF file that `source` means, downloaded if it is a hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise WrongUse(f"{path} is a file and no .gguf", "give the folder that it is in")
        return path
    if _HUB_ID.fullmatch(source) and path.suffix not in (".gguf", ".safetensors"):
        return _download(source, revision)
    raise WrongUse(
        f"there is no model {source}", "give a folder, a .gguf file or a hub id such as org/name"
    )


def _download(name: str, revision: str | None) -> Path:
    """The snapshot of a hub id; raises BadInput."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_WANTED)
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise BadInput(
            f"{name} is neither a folder here nor in the hub's cache, and the hub is out of reach",
            f"download it where there is a network (hf download {name}) and give the folder",
        ) from error
    except errors.GatedRepoError as error:
        hint = "accept its licence on its page and log in (hf auth login)"
        raise BadInput(f"{name} asks for a licence to be accepted", hint) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        at = f" at revision {revision}" if revision else ""
        raise WrongUse(
            f"there is no folder {name}, and no model of that name on the hub{at}",
            "check the spelling; private models need a login (hf auth login)",
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        hint = "try again, or download it by other means and give the folder"
        raise BadInput(f"download of {name} failed: {error}", hint) from error
    return Path(folder)


def open_folder(folder: Path, trust_remote_code: bool) -> tuple[Any, dict[str, LazyTensor]]:
    """(config, tensors) of a Hugging Face folder; raises BadInput."""
    file = folder / "config.json"
    if not file.is_file():
        gguf = sorted(folder.glob("*.gguf"))
        hint = f"give {gguf[0]}" if gguf else "is this the folder of a model?"
        raise BadInput(f"{folder} has no config.json", hint)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        kind = raw["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{file} is damaged: {error!r}", "download it again") from error
    if raw.get("quantization_config"):
        about = raw["quantization_config"]
        method = about.get("quant_method", "unknown") if isinstance(about, dict) else about
        raise BadInput(
            f"{folder} is already compressed (quantization_config: {method})",
            "open the model that it was made from",
        )
    stored = safetensors_folder(folder)
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        count = raw.get(key)
        if isinstance(count, int) and count > len(stored):  # building so many would not end
            what = f"{file} says {key} = {count}, with {len(stored)} tensors in all"
            raise BadInput(what, "config and weights are not of one model")
    return _config(folder, kind, trust_remote_code), stored


def _config(folder: Path, kind: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a foreign config makes transformers say
        code = "" if trust_remote_code else "; a model with code of its own needs trust_remote_code"
        raise BadInput(
            f"transformers cannot read the config of {folder} (model_type {kind!r}): {error}",
            f"is it a language model that this transformers knows?{code}",
        ) from error


def family(config: Any) -> str | None:
    """The registered family of a config, None if lighten knows none."""
    kind = str(getattr(config, "model_type", ""))
    return kind if kind in families else None


def open_gguf(path: Path) -> tuple[GgufFile, str, Any]:
    """(header, family, config) of a GGUF file; raises BadInput."""
    from transformers import AutoConfig

    file = read_gguf(path)
    if int(file.metadata.get("split.count") or 0) > 1:
        hint = "join its parts first (llama-gguf-split --merge)"
        raise BadInput(f"{path} is one part of a split model", hint)
    arch = file.architecture
    known = {name: f for name, f in families.items() if f.gguf_arch == arch}
    names = [name for name, f in known.items() if f.claims(file.metadata)]
    if not names:
        archs = ", ".join(sorted({f.gguf_arch for f in families.values()}))
        hint = f"known: {archs}; or open the Hugging Face folder that it was made from"
        raise BadInput(f"{path} is of the architecture `{arch}`, unknown to lighten", hint)
    settings = known[names[0]].config(file.metadata, file.tensors)
    try:
        config = AutoConfig.for_model(names[0], **settings)
    except Exception as error:  # transformers validates with exceptions of many kinds
        raise BadInput(f"the metadata of {path} make no {arch}: {error}", "is it whole?") from error
    return file, names[0], config
