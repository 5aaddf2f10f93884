"""Pictures in Parquet files, as Hugging Face lays them out: a column of {bytes, path}, and labels.

Columns are found by their types, names only choose among several.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lighten.errors import BadInput, MissingPackage
from lighten.image_sources import Pixels, checked_labels
from lighten.progress import note

if TYPE_CHECKING:
    import pyarrow as pa

_IMAGES = ("image", "img", "images", "picture")
_LABELS = ("label", "labels", "fine_label", "class", "target")
_MEMORY = 1 << 28  # bytes of encoded images that stay in memory


class Tables:
    """The rows of some Parquet files, one after another."""

    def __init__(self, paths: list[Path]) -> None:
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise MissingPackage(
                "Parquet files need the package `pyarrow`", "pip install lighten[images]"
            ) from error
        self._files, self._paths = [], paths
        self._starts: list[int] = []  # first row of each group
        self._groups: list[tuple[int, int]] = []  # (file, row group)
        count = 0
        for i, path in enumerate(paths):
            try:
                file = pq.ParquetFile(path)
            except Exception as error:  # arrow's errors, and OSError
                raise BadInput(f"{path} is no Parquet file: {error}", "is it whole?") from error
            self._files.append(file)
            for group in range(file.num_row_groups):
                self._starts.append(count)
                self._groups.append((i, group))
                count += file.metadata.row_group(group).num_rows
        if not count:
            raise BadInput(f"{paths[0]} has no image in it")
        self.count = count
        schema = self._files[0].schema_arrow
        self._image = _image_column(schema, paths[0])
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self.random = sum(p.stat().st_size for p in paths) <= _MEMORY
        self.classes: tuple[str, ...] = ()
        self.labels: npt.NDArray[np.int64] | None = None
        label = _label_column(schema, self._image, paths[0])
        if label is not None:
            self.labels, self.classes = self._read_labels(label, schema)

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, bytes | Pixels]]:
        where = np.searchsorted(self._starts, np.asarray(rows), side="right") - 1
        for i in np.argsort(where, kind="stable"):
            row, group = int(rows[i]), int(where[i])
            value = self._column(group)[row - self._starts[group]].as_py()
            yield row, self._bytes(value, row, group)

    def name(self, row: int) -> str:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        path = self._paths[self._groups[group][0]]
        return f"{path.name}[{row}]"

    def _bytes(self, value: Any, row: int, group: int) -> bytes:
        if isinstance(value, dict):
            path = value.get("path")
            value = value.get("bytes")
            if value is None and path and not Path(path).is_absolute() and ".." not in path:
                beside = self._paths[self._groups[group][0]].parent / path
                value = beside.read_bytes() if beside.is_file() else None
        if not isinstance(value, bytes) or not value:
            raise BadInput(f"{self.name(row)} holds no image", "its bytes are not in the file")
        return value

    def _column(self, group: int) -> pa.ChunkedArray:
        """The images of a row group; the last groups are kept, as many as memory is given to."""
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        i, inside = self._groups[group]
        try:
            column = self._files[i].read_row_group(inside, columns=[self._image])[self._image]
        except Exception as error:
            raise BadInput(f"{self._paths[i]} is damaged: {error}", "is it whole?") from error
        self._cache[group] = column
        while len(self._cache) > 1 and sum(c.nbytes for c in self._cache.values()) > _MEMORY:
            self._cache.popitem(last=False)
        return column

    def _read_labels(
        self, name: str, schema: pa.Schema
    ) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
        values: list[Any] = []
        for path, file in zip(self._paths, self._files, strict=True):
            try:
                values += file.read(columns=[name])[name].to_pylist()
            except Exception as error:
                raise BadInput(f"{path} has no labels in `{name}`: {error}") from error
        if None in values:
            raise BadInput(f"{self.name(values.index(None))} has no label")
        if isinstance(values[0], str):
            names = sorted(set(values))
            number = {n: i for i, n in enumerate(names)}
            return np.array([number[v] for v in values], np.int64), tuple(names)
        labels = checked_labels(np.array(values), self.count, self._paths[0].name)
        names = _class_names(schema, name)
        if names and int(labels.max()) >= len(names):
            worst = int(labels.argmax())
            raise BadInput(
                f"{self.name(worst)} has the label {labels[worst]}, there are {len(names)} classes"
            )
        return labels, tuple(names)


def _image_column(schema: pa.Schema, path: Path) -> str:
    import pyarrow as pa

    def holds(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    found = [field.name for field in schema if holds(field.type)]
    named = [n for n in _IMAGES if n in found]
    if not found or (len(found) > 1 and not named):
        kinds = ", ".join(f"{field.name}: {field.type}" for field in schema)
        which = "no column of images" if not found else f"several: {', '.join(found)}"
        raise BadInput(f"{path} has {which} ({kinds})", "a column `image` of {bytes, path}")
    return named[0] if named else found[0]


def _label_column(schema: pa.Schema, image: str, path: Path) -> str | None:
    import pyarrow as pa

    def holds(kind: pa.DataType) -> bool:
        return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))

    def words(kind: pa.DataType) -> bool:
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

    others = [field for field in schema if field.name != image]
    named = {f.name for f in others if holds(f.type) or words(f.type)}
    for name in _LABELS:
        if name in named:
            return name
    numbers = [str(f.name) for f in others if holds(f.type)]
    if len(numbers) == 1:
        return numbers[0]
    if numbers:
        note(f"{path}: none of {', '.join(numbers)} is called `label`: no labels are read")
    return None


def _class_names(schema: pa.Schema, column: str) -> list[str]:
    """Names that the Hugging Face `datasets` library keeps in the file's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(n) for n in features[column]["names"]]
    except (KeyError, TypeError, ValueError):
        return []
