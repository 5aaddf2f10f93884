"""Names -> plain objects, filled by importing every file of a plug-in folder and every entry point.

Adding a format, solver, criterion, loss, transform, exporter or family touches one file: it
registers itself on import, and a look-up imports the whole folder first.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from lighten.errors import UnknownName, WrongUse

T = TypeVar("T")


class Registry(dict[str, T], Generic[T]):
    """A dict of one kind of plug-in: `formats["q4_0"]`, with nearest-name errors.

    >>> colours = Registry("colour")
    >>> _ = colours("red")("#f00")
    >>> colours["rde"]
    Traceback (most recent call last):
    ...
    lighten.errors.UnknownName: unknown colour `rde`
    <BLANKLINE>
    hint: did you mean `red`? known: red
    """

    def __init__(self, kind: str, folder: str | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.folder = folder
        self.homes: dict[str, str] = {}  # name -> the module that registered it
        self._discovered = folder is None
        self._discovering = False
        self._lock = threading.RLock()

    def __call__(self, name: str) -> Callable[[T], T]:
        """Decorate or call with an object to register it under `name`."""
        home = sys._getframe(1).f_globals.get("__name__", "")

        def add(entry: T) -> T:
            if dict.__contains__(self, name):
                where = f"by {self.homes.get(name)} and by {home}"
                raise WrongUse(f"{self.kind} `{name}` is registered twice, {where}")
            self[name] = entry
            self.homes[name] = home
            return entry

        return add

    def discover(self) -> None:
        """Import every file of the folder, then every entry point of group `lighten.<folder>`."""
        if self._discovered or self.folder is None:
            return
        with self._lock:  # another thread that asks meanwhile has to wait for the whole folder
            if self._discovered or self._discovering:
                return
            self._discovering = True
            try:
                package = importlib.import_module(f"lighten.{self.folder}")
                for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
                    importlib.import_module(f"lighten.{self.folder}.{module.name}")
                for entry in entry_points(group=f"lighten.{self.folder}"):
                    entry.load()
                self._discovered = True
            finally:
                self._discovering = False

    def __missing__(self, name: str) -> T:
        self.discover()
        if dict.__contains__(self, name):
            return dict.__getitem__(self, name)
        near = difflib.get_close_matches(name, list(dict.keys(self)), 3)
        guess = f"did you mean {' or '.join(f'`{n}`' for n in near)}? " if near else ""
        known = f"known: {', '.join(sorted(dict.keys(self)))}"
        raise UnknownName(f"unknown {self.kind} `{name}`", guess + known)

    def __contains__(self, name: object) -> bool:
        self.discover()
        return dict.__contains__(self, name)

    def __iter__(self) -> Iterator[str]:
        self.discover()
        return dict.__iter__(self)

    def __len__(self) -> int:
        self.discover()
        return dict.__len__(self)

    def keys(self) -> Any:
        self.discover()
        return dict.keys(self)

    def values(self) -> Any:
        self.discover()
        return dict.values(self)

    def items(self) -> Any:
        self.discover()
        return dict.items(self)


formats: Registry[Any] = Registry("format", "formats")
solvers: Registry[Any] = Registry("solver", "solvers")
criteria: Registry[Any] = Registry("criterion", "criteria")
losses: Registry[Any] = Registry("loss", "losses")
transforms: Registry[Any] = Registry("transform", "transforms")
exporters: Registry[Any] = Registry("exporter", "exporters")
families: Registry[Any] = Registry("family", "families")
