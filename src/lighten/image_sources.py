"""Where pictures lie: folders, zip files, Parquet, arrays. Encoded, by number, read when asked for.

Packages for Parquet (pyarrow) are imported when a Parquet file is opened.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lighten.errors import BadInput, UserError, WrongUse

Pixels = npt.NDArray[Any]
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
_PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
_LARGEST = 1 << 28  # bytes of one file in a zip
_IMAGES = ("x", "images", "image", "data", "x_test", "test_images", "x_train", "train_images")
_LABELS = ("y", "labels", "label", "targets", "y_test", "test_labels", "y_train", "train_labels")


class Source(Protocol):
    """Pictures by number 0..count - 1.

    labels: (count,) int64 or None. classes: their names, empty where they have none. random:
    whether reading in any order costs no more than reading front to back.
    """

    @property
    def count(self) -> int: ...
    @property
    def labels(self) -> npt.NDArray[np.int64] | None: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def random(self) -> bool: ...

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, bytes | Pixels]]:
        """(number, encoded file or array) of each of `rows`, in any order; raises BadInput."""

    def name(self, row: int) -> str:
        """What a message calls a picture."""


def open_source(path: str | Path) -> Source:
    """The pictures at a path; raises WrongUse or BadInput where there are none."""
    root = Path(path).expanduser()
    if root.is_dir():
        files = [
            p.relative_to(root).as_posix() for p in sorted(root.rglob("*")) if p.is_file()
        ]  # fmt: skip
        tables = [f for f in files if f.endswith(".parquet") and not _hidden(f)]
        pictures = [f for f in files if _picture(f)]
        if tables and pictures:
            raise BadInput(f"{path} holds Parquet files and images", "give one kind")
        if tables:
            _one_part(path, tables)
            return _parquet([root / f for f in tables])
        return _Files(_Folder(root), str(path), pictures)
    if not root.is_file():
        raise WrongUse(f"there is no data at {path}", _HINT)
    if root.suffix == ".zip":
        archive = _Zip(root)
        return _Files(archive, str(path), [n for n in archive.names() if _picture(n)])
    if root.suffix == ".npz":
        return _arrays(root)
    if root.suffix == ".parquet":
        return _parquet([root])
    raise BadInput(f"{path} is no image data that lighten knows", _HINT)


_HINT = "give a folder with a folder for each class, a zip of one, a .parquet or a .npz file"


def _picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not _hidden(name)


def _hidden(name: str) -> bool:
    return any(part[:1] == "." or part == "__MACOSX" for part in name.split("/"))


def _one_part(path: str | Path, names: Iterable[str]) -> None:
    """Raise where training and test data would be taken together."""
    words = [(n, set(re.split(r"[\W_\d]+", n.lower())) & _PARTS) for n in names]
    parts = {min(found) for _, found in words if found}
    if len(parts) > 1:
        firsts = [next(n for n, found in words if p in found) for p in sorted(parts)]
        raise WrongUse(
            f"{path} holds the parts {', '.join(sorted(parts))}", f"name one: {path}/{firsts[0]}"
        )


class _Folder:
    """Files of a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()


class _Zip:
    """Files of a zip archive; nothing is unpacked to disk."""

    def __init__(self, path: Path) -> None:
        try:
            self.archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise BadInput(f"{path} is no zip file: {error}", "zip the folder again") from error

    def names(self) -> list[str]:
        return sorted(i.filename for i in self.archive.infolist() if not i.is_dir())

    def read(self, name: str) -> bytes:
        size = self.archive.getinfo(name).file_size
        if size > _LARGEST:
            raise BadInput(f"{name} would unpack to {size / 1e6:.0f} MB", "is it an image?")
        return self.archive.read(name)


class _Files:
    """Image files in folders named like their classes, or loose without labels."""

    random = True

    def __init__(self, store: _Folder | _Zip, source: str, names: list[str]) -> None:
        if not names:
            raise BadInput(f"{source} has no image in it", f"files end in {' '.join(SUFFIXES)}")
        self._store, self._names, skip = store, names, 0
        if isinstance(store, _Zip):  # a zip often has the folder itself at its top
            while len({n.split("/")[skip] for n in names}) == 1 and all(
                n.count("/") >= skip + 2 for n in names
            ):
                skip += 1
        tops = sorted({n.split("/")[skip] for n in names if n.count("/") > skip})
        loose = [n for n in names if n.count("/") == skip]
        if tops and loose:
            raise BadInput(
                f"{source} has loose images beside folders of them, such as {loose[0]}",
                "put every image in the folder of its class, or all of them in one",
            )
        if tops and {t.lower() for t in tops} <= _PARTS:
            raise WrongUse(f"{source} holds the parts {', '.join(tops)}", "give one of them")
        number = {name: i for i, name in enumerate(tops)}
        self.count = len(names)
        self.classes = tuple(tops)
        self.labels = None
        if tops:
            self.labels = np.array([number[n.split("/")[skip]] for n in names], np.int64)

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, bytes | Pixels]]:
        for row in rows:
            try:
                yield row, self._store.read(self._names[row])
            except UserError:
                raise
            except Exception as error:  # zip files fail in many ways
                raise BadInput(
                    f"cannot read {self._names[row]}: {error}", "is it whole?"
                ) from error

    def name(self, row: int) -> str:
        return self._names[row]


def _parquet(files: list[Path]) -> Source:
    from lighten.image_tables import Tables

    return Tables(files)


@dataclass(frozen=True)
class _Arrays:
    """Arrays in memory: uint8 pixels, or floats, which are taken as they are."""

    data: Pixels
    labels: npt.NDArray[np.int64] | None
    source: str
    classes: tuple[str, ...] = ()
    random: bool = True

    @property
    def count(self) -> int:
        return len(self.data)

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, bytes | Pixels]]:
        for row in rows:
            yield row, self.data[row]

    def name(self, row: int) -> str:
        return f"{self.source}[{row}]"


def _arrays(path: Path) -> Source:
    """A .npz with images under `x`, `images` or `data`, and labels under `y` or `labels`."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            names = list(file)
            images = [n for n in _IMAGES if n in names]
            labels = [n for n in _LABELS if n in names]
            if not images:
                raise BadInput(
                    f"{path} has the arrays {', '.join(names) or 'none'}, none with images",
                    "call them `x` and `y`",
                )
            found = file[images[0]]
            y = file[labels[0]] if labels else None
    except UserError:
        raise
    except Exception as error:  # zip, header, and object arrays, which need a pickle
        raise BadInput(
            f"{path} cannot be read as plain arrays: {error}", "numpy.savez(path, x=..., y=...)"
        ) from error
    if not (found.dtype == np.uint8 or np.issubdtype(found.dtype, np.floating)) or found.ndim < 2:
        raise BadInput(
            f"`{images[0]}` is {found.dtype} of shape {found.shape}",
            "give (n, h, w), (n, h, w, channels) or (n, channels, h, w) as uint8, or floats",
        )
    if not len(found):
        raise BadInput(f"{path} has no image in it")
    bad = None if found.dtype == np.uint8 else np.flatnonzero(~np.isfinite(found).reshape(
        len(found), -1).all(1))  # fmt: skip
    if bad is not None and len(bad):
        raise BadInput(f"{path}[{bad[0]}] holds NaN or infinite values")
    if found.dtype == np.uint8:
        found = _channels_first(found, str(path))
    if y is not None:
        y = checked_labels(y.reshape(-1), len(found), str(path))
    return _Arrays(found, y, str(path))


def _channels_first(x: Pixels, source: str) -> Pixels:
    """Pixels as (n, channels, h, w)."""
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[3] in (1, 3):
        return x.transpose(0, 3, 1, 2)
    if x.ndim == 4 and x.shape[1] in (1, 3):
        return x
    raise BadInput(f"{source} has images of shape {x.shape[1:]}", "1 or 3 channels, first or last")


def checked_labels(values: npt.NDArray[Any], count: int, source: str) -> npt.NDArray[np.int64]:
    """Labels as int64, one an image; raises BadInput with the first that is none."""
    if len(values) != count:
        raise BadInput(f"{source} has {count} images and {len(values)} labels")
    whole = np.issubdtype(values.dtype, np.integer) or values.dtype == np.bool_
    if not whole:
        raise BadInput(f"{source}: labels are {values.dtype}, not whole numbers")
    if len(below := np.flatnonzero(values < 0)):
        raise BadInput(
            f"{source}: the label of image {below[0]} is {values[below[0]]}",
            "labels count from 0; -1 usually stands for a test set without labels",
        )
    return values.astype(np.int64)
