"""A .pt2 file, as torch.export.save writes it, opened without running pickles."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from lighten.errors import BadInput, WrongUse
from lighten.network import graph_of

_PLAIN = ("tensor_", "weight_")
"""Names of payloads that are raw numbers; all others are objects."""


def open_program(path: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The graph module of a .pt2 file and the example inputs it was exported with.

    Raises WrongUse where there is no file or it takes other than positional tensors, BadInput where
    it is damaged or would run a pickle.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise WrongUse(f"there is no file {path}", "give a file of torch.export.save")
    _refuse_pickles(file)
    try:
        program = torch.export.load(str(file))
        graph = graph_of(program)
    except Exception as error:  # torch raises dozens of kinds
        raise BadInput(
            f"{path} cannot be opened by torch.export: {type(error).__name__}: {error}",
            "export it again with the torch that is installed here",
        ) from error
    arguments, options = program.example_inputs or ((), {})
    if not arguments or options or not all(isinstance(x, Tensor) for x in arguments):
        raise WrongUse(
            f"{path} takes other inputs than positional tensors",
            "export the module with a tuple of tensors",
        )
    return _plain(graph, program.call_spec.out_spec), tuple(arguments)


def _refuse_pickles(file: Path) -> None:
    """torch.export.load falls back on pickle for some payloads: such files are refused.

    Example inputs have to load as tensors alone; of weights and constants only raw numbers pass.
    """
    hint = "export it again with the torch that is installed here, inputs and constants as tensors"
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            old = [n for n in names if n.rpartition("/")[2].startswith("serialized_")]
            samples = [n for n in names if "/data/sample_inputs/" in f"/{n}"]
            stored = ("/data/weights/", "/data/constants/")
            for name in [n for n in names if any(part in f"/{n}" for part in stored)]:
                if name.endswith("_config.json"):
                    for key, entry in json.loads(archive.read(name))["config"].items():
                        raw = entry["path_name"].startswith(_PLAIN)
                        if entry["use_pickle"] is not False or not raw:
                            raise BadInput(f"{file}: `{key}` is stored as a pickle", hint)
                elif name.endswith(".pt"):
                    old.append(name)
            compiled = [n for n in names if "/data/aotinductor/" in f"/{n}"]
            twice = len(set(names)) != len(names)  # readers differ in which of two they take
            if old or compiled or twice or not samples:
                what = "compiled code" if compiled else "an older layout"
                what = "two files of one name" if twice else what
                raise BadInput(f"{file} holds {what}, not a plain exported program", hint)
            for name in samples:
                content = archive.read(name)
                if content:
                    torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"{file} is no program that can be opened without a pickle: {type(error).__name__}",
            hint,
        ) from error


def _plain(graph: fx.GraphModule, outputs: Any) -> fx.GraphModule:
    """The same as an ordinary module: tensors in, one tensor or a tuple of them out, eval() works.

    An exported module packs and unpacks its arguments by specs and refuses eval().
    """
    one = outputs is None or outputs.is_leaf()
    for node in graph.graph.nodes:
        if node.op == "output" and one and isinstance(node.args[0], tuple | list):
            node.args = (node.args[0][0],)
    graph.graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(graph, graph.graph)
