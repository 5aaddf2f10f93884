"""What a user gives as data, read into memory: a loader to its end, labels beside the inputs.

A DataLoader, an iterable of batches, a torch Dataset and a pair of tensors become inputs
(count, ...) and labels (count,) int64, or none. Labels that are there for some examples alone, and
data that ends before the length that it has, are mistakes: what is measured would quietly be
another thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lighten.errors import BadInput, NoRoom, WrongUse
from lighten.progress import note
from lighten.seen import IGNORED

_BATCH = 64
"""Examples of a Dataset that are put together at once."""


def length_of(data: Any) -> int | None:
    """What `len` says, None where it says nothing (a DataLoader of a stream has no length)."""
    try:
        return len(data)
    except TypeError:
        return None


def read_batches(
    batches: Iterable[Any], *, most: int | None = None, room: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Inputs and labels of all batches, or of so many that there are `most` examples.

    Raises BadInput without a batch, where the data ends before its length, where some batches alone
    have labels and where batches have different shapes; NoRoom above `room` bytes.
    """
    xs: list[Tensor] = []
    ys: list[Tensor | None] = []
    count = size = 0
    for batch in _to_the_end(batches):
        x, y = batch_of(batch, say=not xs)
        if xs and x.shape[1:] != xs[0].shape[1:]:
            raise BadInput(
                f"batch {len(xs)} has examples {tuple(x.shape[1:])}, those before"
                f" {tuple(xs[0].shape[1:])}",
                "all examples need one shape",
            )
        xs.append(x)
        ys.append(y)
        count += len(x)
        size += x.numel() * x.element_size()
        if room is not None and size > room:
            raise NoRoom(
                f"the batches of a {type(batches).__name__} hold more than {room / 1e9:.0f} GB",
                "give a path of images, which are read when they are needed",
            )
        if most is not None and count >= most:
            break
    if not xs:
        raise BadInput("the data has no batch", "give at least one")
    without = [i for i, y in enumerate(ys) if y is None]
    if 0 < len(without) < len(ys):
        raise BadInput(
            f"{len(without)} of {len(ys)} batches have no labels, the first of them batch"
            f" {without[0]}; others have",
            f"give labels with every batch, {IGNORED} where there is none, or with no batch",
        )
    labels = None if without else torch.cat([y for y in ys if y is not None])[:most]
    return torch.cat(xs)[:most], labels


def batch_of(item: Any, say: bool = True) -> tuple[Tensor, Tensor | None]:
    """Inputs and labels of a batch, on the CPU. say: a note of what is beside them and is no labels
    (targets of pixels, say). Raises BadInput where it has no tensor, or labels for others."""
    x, y = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
    x = x[0] if isinstance(x, tuple | list) else x
    if not isinstance(x, Tensor):
        raise BadInput(f"a batch is a {type(x).__name__}", "batches must be tensors")
    if y is None:
        return x.cpu(), None
    try:
        y = as_labels(torch.as_tensor(y).cpu())
    except (TypeError, ValueError, RuntimeError):  # text, mappings, tensors in lists
        if say:
            note(f"beside the inputs is a {type(y).__name__}, which is no labels: it is not used")
        return x.cpu(), None
    if y.dim() != 1:
        if say:
            note(f"what is beside the inputs, {tuple(y.shape)}, is no label for each: not used")
        return x.cpu(), None
    if len(y) != len(x):
        raise BadInput(f"a batch of {len(x)} inputs has {len(y)} labels", "give one for each")
    return x.cpu(), y


def pair_of(data: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
    """(inputs, labels) as tensors; raises BadInput where there are not as many of both."""
    x, y = torch.as_tensor(data[0]), as_labels(torch.as_tensor(data[1]))
    if len(x) != len(y):
        raise BadInput(f"{len(x)} inputs and {len(y)} labels", "give as many of both")
    return x, y


def as_labels(y: Tensor) -> Tensor:
    """Labels as losses take them: (count,) of a column (count, 1); whole numbers as int64."""
    if y.dim() == 2 and y.shape[1] == 1:
        y = y[:, 0]
    return y if y.is_floating_point() or y.is_complex() else y.long()


def is_dataset(data: Any) -> bool:
    """Whether data is examples by number, a torch Dataset, and no batches."""
    from torch.utils.data import Dataset, IterableDataset

    return isinstance(data, Dataset) and not isinstance(data, IterableDataset)


def read_dataset(
    data: Any, rows: Tensor | None = None, *, room: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Inputs and labels of a torch Dataset, all or those rows, put together as a DataLoader does.

    Raises WrongUse where it has no length, BadInput where its examples make no batch.
    """
    from torch.utils.data import DataLoader, Subset

    hint = "give a loader of batches: DataLoader(dataset, batch_size=64)"
    if length_of(data) is None:
        raise WrongUse(f"a {type(data).__name__} says not how many examples it has", hint)
    chosen = data if rows is None else Subset(data, rows.tolist())
    # a generator of its own: a loader draws from torch's otherwise
    loader = DataLoader(chosen, _BATCH, generator=torch.Generator())
    try:
        return read_batches(loader, room=room)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"the examples of a {type(data).__name__} make no batch:"
            f" {type(error).__name__}: {error}",
            f"{hint}, with the collate_fn that they need",
        ) from error


def check_other(data: Any, test: Any) -> None:
    """Raises WrongUse where what is measured on is what is learned from and calibrated on."""
    paths = isinstance(data, str | Path) and isinstance(test, str | Path)
    same = Path(data).resolve() == Path(test).resolve() if paths else data is test
    if data is not None and same:
        raise WrongUse(
            "test is the data itself: nothing would be measured that was not learned from",
            "leave test out (a part of the data is held out then), or give other data",
        )


def check_finite(x: Tensor) -> None:
    """Raises BadInput where inputs are not finite, and says which."""
    if not x.is_floating_point() or bool(torch.isfinite(x).all()):
        return
    bad = (~torch.isfinite(x.flatten(1) if x.ndim > 1 else x[:, None])).any(1)
    raise BadInput(
        f"the data holds NaN or infinite values, first in example {int(bad.nonzero()[0])}"
        f" ({int(bad.sum())} of {len(x)} examples)",
        "check how it is normalised",
    )


def check_classes(
    labels: Tensor | None, classes: int, source: str, who: str = "network",
    name: Callable[[int], str] = "example {}".format,
) -> None:  # fmt: skip
    """Raise BadInput where a label is no class of a network that has so many, and say which.

    who: whose classes they are. name: what an example is called. IGNORED marks one without a
    label.
    """
    if labels is None:
        return
    if labels.is_floating_point() or labels.ndim != 1:
        raise BadInput(
            f"labels are {labels.dtype} {tuple(labels.shape)}", "one integer for each example"
        )
    wrong = ((labels < 0) & (labels != IGNORED)) | (labels >= classes)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise BadInput(
            f"{source}: the label of {name(first)} is {int(labels[first])}, but the {who} has"
            f" {classes} classes: 0 to {classes - 1} ({int(wrong.sum())} of {len(labels)} are out"
            " of range)",
            f"labels count from 0, {IGNORED} marks what has none; is the data of other classes?",
        )


def known(labels: Tensor | None) -> Tensor | None:
    """Labels, or None where no example has one."""
    return None if labels is None or bool((labels == IGNORED).all()) else labels


def _to_the_end(batches: Iterable[Any]) -> Iterator[Any]:
    """What a loader gives; raises BadInput where it ends before the length that it has."""
    count, said = 0, length_of(batches)
    left = iter(())
    while True:
        # what shuffles and what transforms at random draw from torch's generator: as the data is
        # part of what a run is known by, the same call must read the same
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(count)
            left = left if count else iter(batches)
            item = next(left, left)
        if item is left:
            break
        yield item
        count += 1
    if said is not None and count < said:
        raise BadInput(
            f"the data ended after {count} batches, it said it had {said}",
            "is something that it reads cut off?",
        )
