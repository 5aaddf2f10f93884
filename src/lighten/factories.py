"""The front door of networks: `package.module:factory`, `path/to/file.py:factory` or a .pt2 file.

A factory is a function or class that makes a torch.nn.Module. It may be given arguments, as
literals only: `models.py:net(width=0.5, classes=10)`. The current folder can be imported from.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lighten.errors import BadInput, MissingPackage, UserError, WrongUse
from lighten.network import Network
from lighten.network_weights import load_weights, read_weights
from lighten.program_file import open_program

_FORM = "write package.module:factory or path/to/file.py:factory"
_BATCH = 2  # one would be taken for a constant of the network when it is traced


@dataclass(frozen=True)
class Factory:
    """Where a network is made. home: a module's name or a .py file. call: arguments as written."""

    home: str
    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Factory:
        """Read `home:name` or `home:name(literals)`; raises WrongUse.

        >>> Factory.parse("models.py:net(width=0.5)").options
        {'width': 0.5}
        """
        match = re.fullmatch(r"(?P<home>.+?):(?P<name>[A-Za-z_][\w.]*)(?P<call>\(.*\))?", text)
        if match is None:
            raise WrongUse(f"`{text}` names no factory", _FORM)
        arguments, options = _literals(match["call"] or "()", text)
        return cls(match["home"], match["name"], arguments, options)

    def make(self) -> tuple[nn.Module, Any]:
        """The module and its example inputs (None unless the factory gives both).

        Raises WrongUse, MissingPackage, and BadInput where the user's code fails.
        """
        found = self._attribute(self._module())
        where = f"{self.home}:{self.name}"
        if isinstance(found, nn.Module):
            if self.arguments or self.options:
                raise WrongUse(f"{where} is a module already, it takes no arguments")
            return found, None
        if not callable(found):
            raise WrongUse(f"{where} is a {type(found).__name__}, not a function or class", _FORM)
        made = self._called(found, where)
        inputs = None
        if isinstance(made, tuple) and len(made) == 2:
            made, inputs = made
        if not isinstance(made, nn.Module):
            raise WrongUse(
                f"{where} gives a {type(made).__name__}, not a torch.nn.Module",
                "a factory returns the module, or the module and its example inputs",
            )
        return made, inputs

    def _module(self) -> ModuleType:
        if self.home.endswith(".py"):
            return _import_file(self.home)
        folder = os.getcwd()
        if not {"", folder} & set(sys.path):
            sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            return importlib.import_module(self.home)
        except ModuleNotFoundError as error:
            if error.name and f"{self.home}.".startswith(f"{error.name}."):
                raise WrongUse(
                    f"there is no module `{error.name}` here",
                    f"{_FORM}; modules are looked for in the current folder and what is installed",
                ) from error
            raise _needs(self.home, error) from error
        except UserError:
            raise
        except Exception as error:
            raise _raised(self.home, error) from error

    def _attribute(self, module: ModuleType) -> Any:
        found: Any = module
        for part in self.name.split("."):
            if not hasattr(found, part):
                public = [n for n, v in vars(found).items() if n[:1] != "_" and callable(v)]
                near = difflib.get_close_matches(part, public, 3)
                own = [n for n in public if getattr(vars(found)[n], "__module__", "") == getattr(
                    found, "__name__", None)]  # fmt: skip
                guess = f"did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else ""
                raise WrongUse(
                    f"{self.home} has no `{part}`", guess or f"it has {', '.join(own) or 'nothing'}"
                )
            found = getattr(found, part)
        return found

    def _called(self, factory: Any, where: str) -> Any:
        try:
            signature = inspect.signature(factory)
        except (TypeError, ValueError):  # of some built-in callables
            signature = None
        if signature is not None:
            try:
                signature.bind(*self.arguments, **self.options)
            except TypeError as error:
                raise WrongUse(
                    f"{where} cannot be called so: {error}",
                    f"it is {self.name}{signature}; give arguments as {self.name}(width=0.5)",
                ) from error
        try:
            return factory(*self.arguments, **self.options)
        except UserError:
            raise
        except ImportError as error:
            raise _needs(where, error) from error
        except Exception as error:
            raise _raised(where, error) from error


def open_network(
    source: str,
    weights: str | Path | None = None,
    *,
    inputs: Tensor | tuple[Tensor, ...] | None = None,
    size: int | tuple[int, ...] | None = None,
    channels: int = 3,
) -> Network:
    """A network from `package.module:factory`, `file.py:factory` or a .pt2 file.

    weights: what is loaded into it (read_weights); None: it stays as the factory makes it. inputs:
    example inputs; else `size`: an image's side, with `channels`, or the shape of one example
    without its batch; else what the factory or the file gives. Raises UserError.
    """
    if source.endswith(".pt2"):
        module, own = open_program(source)
    else:
        module, own = Factory.parse(source).make()
    if weights is not None:
        load_weights(module, read_weights(weights), str(weights))
    if inputs is None and size is not None:
        inputs = example_images(size, channels, _like(module))
    if inputs is None:
        inputs = own
    if inputs is None:
        raise WrongUse(
            f"it is not known what {source} is called with",
            "give the side of its images, --size 224, or return (module, example inputs)",
        )
    return Network.of(module, inputs, source)


def example_images(
    size: int | tuple[int, ...], channels: int = 3, like: Tensor | None = None
) -> Tensor:
    """Two random examples: images (2, channels, size, size), or of shape (2, *size); seed 0."""
    shape = (channels, size, size) if isinstance(size, int) else tuple(size)
    if not shape or any(n < 1 for n in shape):
        raise WrongUse(f"examples cannot have the shape {shape}", "--size 224")
    drawn = torch.randn(_BATCH, *shape, generator=torch.Generator().manual_seed(0))
    return drawn if like is None else drawn.to(like.device, like.dtype)


def _like(module: nn.Module) -> Tensor | None:
    """A floating-point tensor of the module, whose device and type its inputs should have."""
    tensors = (*module.parameters(), *module.buffers())
    return next((t for t in tensors if t.is_floating_point()), None)


def _import_file(path: str) -> ModuleType:
    """A .py file as a module, its folder importable as when it is run."""
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise WrongUse(f"there is no file {path}", _FORM)
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise WrongUse(f"{path} cannot be imported", _FORM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is executed
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, ModuleNotFoundError):
            raise _needs(path, error) from error
        if isinstance(error, UserError) or not isinstance(error, Exception):
            raise
        raise _raised(path, error) from error
    return module


def _literals(call: str, text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments in `(...)`: Python literals, nothing is evaluated."""
    hint = 'arguments are literals, such as (width=0.5, name="small")'
    try:
        tree = ast.parse(f"f{call}", mode="eval").body
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
            raise WrongUse(f"`{text}` is not a call with arguments", hint)
        arguments = tuple(ast.literal_eval(a) for a in tree.args)
        options = {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords if k.arg}
    except (SyntaxError, ValueError) as error:
        raise WrongUse(f"the arguments of `{text}` cannot be read", hint) from error
    if len(options) != len(tree.keywords):
        raise WrongUse(f"the arguments of `{text}` cannot be read", hint)
    return arguments, options


def _needs(where: str, error: ImportError) -> MissingPackage:
    return MissingPackage(f"{where} needs the package `{error.name}`: {error}", "install it")


def _raised(where: str, error: Exception) -> BadInput:
    at = ""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is not None:
        at = f" (in {Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})"
    return BadInput(f"{where} raised {type(error).__name__}: {error}{at}", "mend the factory")
