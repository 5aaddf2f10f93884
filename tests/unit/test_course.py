"""Courses and feeds: which examples a step sees, how they are changed, data that ends early."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lighten.course import PAD, ImageCourse, augmented, cutmix
from lighten.errors import BadInput, WrongUse
from lighten.feed import CourseFeed, LoaderFeed, feed_of
from lighten.images import load_images
from lighten.seeds import generator


def numbered(count: int) -> ImageCourse:
    return ImageCourse(torch.arange(float(count))[:, None], torch.arange(count))


def flat(parts: list[list[int]]) -> list[int]:
    return [number for part in parts for number in part]


def seen(feed: CourseFeed | LoaderFeed, steps: range) -> list[list[int]]:
    return [[int(v) for x, _ in feed.at(step) for v in x.flatten()] for step in steps]


def test_each_epoch_sees_every_example_in_an_order_of_its_own() -> None:
    feed = CourseFeed(numbered(12), 4, 1, seed=3)
    first, second = seen(feed, range(3)), seen(feed, range(3, 6))
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(12))
    assert first != second
    assert seen(CourseFeed(numbered(12), 4, 1, seed=4), range(3)) != first


def test_a_step_is_the_same_from_wherever_one_begins() -> None:
    whole = seen(CourseFeed(numbered(10), 4, 1, seed=0), range(7))
    assert seen(CourseFeed(numbered(10), 4, 1, seed=0), range(5, 7)) == whole[5:]


def test_parts_and_processes_share_a_batch() -> None:
    (whole,) = seen(CourseFeed(numbered(16), 8, 1, seed=1), range(1))
    parts = CourseFeed(numbered(16), 8, 4, seed=1).at(0)
    assert [len(x) for x, _ in parts] == [2, 2, 2, 2]
    ranks = [seen(CourseFeed(numbered(16), 8, 1, 1, rank, 2), range(1))[0] for rank in (0, 1)]
    assert sorted(flat(ranks)) == sorted(whole)
    assert not set(ranks[0]) & set(ranks[1])


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(WrongUse, match="a batch has 8 examples, the data 5"):
        CourseFeed(numbered(5), 8, 1, seed=0)


def test_a_loader_is_gone_through_again_and_goes_on_where_it_stopped() -> None:
    data = TensorDataset(torch.arange(8.0)[:, None], torch.arange(8))
    loader = DataLoader(data, 2, shuffle=True)
    whole = seen(LoaderFeed(loader, 1, seed=5), range(8))
    assert sorted(flat(whole[:4])) == list(range(8))
    assert whole[:4] != whole[4:]
    assert seen(LoaderFeed(loader, 1, seed=5), range(6, 8)) == whole[6:]


def test_an_iterable_without_a_length_begins_again_where_it_ends() -> None:
    class Stream:
        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter([torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([[3.0]])])

    feed = LoaderFeed(Stream(), 1, seed=0)
    assert feed.per_epoch is None
    assert seen(feed, range(5)) == [[1], [2], [3], [1], [2]]
    assert seen(LoaderFeed(Stream(), 1, seed=0), range(4, 5)) == [[2]]


def test_data_that_can_be_gone_through_only_once_ends_with_an_error() -> None:
    feed = feed_of((torch.full((2, 1), float(i)) for i in range(3)), 2, 1, 0, 0, 1)
    for step in range(3):
        feed.at(step)
    with pytest.raises(BadInput, match="the data ended at step 3") as error:
        feed.at(3)
    assert "more than once" in error.value.hint


def test_a_loader_that_ends_before_its_length_is_an_error() -> None:
    class Short(list):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 5

    feed = LoaderFeed(Short([torch.zeros(2, 1)] * 3), 1, seed=0)
    for step in range(3):
        feed.at(step)
    with pytest.raises(BadInput, match=r"ended at step 3 .* it said it had 5"):
        feed.at(3)


def pictures(count: int = 64) -> Tensor:
    """(count, 1, 8, 8) uint8, every pixel its own value above 0."""
    return torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).repeat(count, 1, 1, 1)


def test_crops_are_windows_of_the_padded_image_mirrored_or_not() -> None:
    x = pictures()
    found = augmented(x, "crop+flip", generator(0))
    padded = torch.nn.functional.pad(x[0], [PAD] * 4)
    windows = {
        bytes(window.contiguous().numpy())
        for i in range(2 * PAD + 1)
        for j in range(2 * PAD + 1)
        for window in (padded[:, i : i + 8, j : j + 8], padded[:, i : i + 8, j : j + 8].flip(2))
    }
    kinds = {bytes(image.contiguous().numpy()) for image in found}
    assert kinds <= windows
    assert len(kinds) > 40


def test_flips_mirror_about_half() -> None:
    x = pictures()
    found = augmented(x, "flip", generator(0))
    mirrored = [bool((image == x[0].flip(2)).all()) for image in found]
    same = [bool((image == x[0]).all()) for image in found]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 16 < sum(mirrored) < 48


def test_a_mixed_image_has_a_rectangle_of_one_other() -> None:
    n, side = 200, 16
    number = torch.arange(float(n)).view(n, 1, 1, 1).expand(n, 2, side, side)
    mixed = cutmix(number, generator(0))
    shares = []
    for own, image in enumerate(mixed):
        assert torch.equal(image[0], image[1])  # all channels of a place come from one image
        other = image[0] != own
        shares.append(float(other.float().mean()))
        assert len(image[0][other].unique()) <= 1
        rows, columns = other.any(1), other.any(0)
        assert torch.equal(other, rows[:, None] & columns[None, :])
        assert int(rows.diff().count_nonzero()) <= 2  # in one piece
        assert int(columns.diff().count_nonzero()) <= 2
    assert max(shares) > 0.7
    assert 0.2 < sum(shares) / n < 0.5  # half, were none cut off at an edge
    assert torch.equal(mixed, cutmix(number, generator(0)))


def test_about_half_of_the_images_of_each_batch_are_mixed_and_none_has_a_label() -> None:
    n = 200
    images = torch.arange(1, n + 1, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 8, 8)
    course = ImageCourse(images, torch.arange(n), augment="crop+flip+cutmix")
    for step in range(3):
        x, labels = course.batch(torch.arange(n), generator(step))
        assert labels is None
        # beside the black of the padding an image has one value, a mixed one has two
        mixed = sum(len(image[image > 0].unique()) == 2 for image in x)
        assert 0.2 < mixed / n < 0.6  # some rectangles lie beside the image's middle, all in black


@pytest.mark.parametrize("augment", ["crop+both", "crop+both+cutmix"])
def test_each_image_comes_beside_its_own_mirror_image(augment: str) -> None:
    course = ImageCourse(pictures(8), torch.arange(8), augment=augment, mean=(0.5,), std=(0.25,))
    x, labels = course.batch(torch.arange(4), generator(0))
    assert len(x) == 8
    assert torch.equal(x[4:], x[:4].flip(-1))
    assert not torch.equal(x[4:], x[:4])
    if "cutmix" in augment:
        assert labels is None
    else:
        assert labels is not None
        assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert len(CourseFeed(course, 4, 1, seed=0).at(0)[0][0]) == 8  # a batch is of images as before
    assert CourseFeed(course, 4, 1, seed=0).per_epoch == 2


def test_a_lesson_of_labels_is_refused_where_there_are_none() -> None:
    x, y = pictures(8), torch.zeros(8, dtype=torch.long)
    ImageCourse(x, y, augment="crop+flip").check(frozenset({"labels"}))
    ImageCourse(x, augment="crop+flip+cutmix").check(frozenset())
    with pytest.raises(WrongUse, match="the data has none"):
        ImageCourse(x).check(frozenset({"labels"}))
    with pytest.raises(WrongUse, match="mixes images of different ones"):
        ImageCourse(x, y, augment="crop+flip+cutmix").check(frozenset({"labels"}))


def test_images_are_padded_before_they_are_normalised() -> None:
    course = ImageCourse(pictures(), augment="crop+flip", mean=(0.5,), std=(0.25,))
    x, labels = course.batch(torch.arange(64), generator(1))
    assert labels is None
    assert x.dtype == torch.float32
    assert float(x.min()) == -2.0  # (0 - .5) / .25: black, not grey


def test_images_of_a_file_are_those_of_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=x, labels=np.arange(10) % 3)
    images = load_images(tmp_path / "a.npz", mean="half", std="half")
    course = ImageCourse(images, rows=torch.tensor([7, 2, 5]))
    found, labels = course.batch(torch.tensor([2, 0]), generator(0))
    assert torch.equal(found, images.tensor([5, 7]))
    whole = images.labels()
    assert whole is not None
    assert labels is not None
    assert torch.equal(labels, whole[[5, 7]])


def test_tokens_stay_whole_numbers() -> None:
    x, _ = ImageCourse(torch.arange(6).view(3, 2)).batch(torch.tensor([1]), generator(0))
    assert x.dtype == torch.int64


def test_what_cannot_be_augmented_is_refused() -> None:
    with pytest.raises(WrongUse, match="the data has 2 dimensions"):
        ImageCourse(torch.zeros(4, 3), augment="flip")
    with pytest.raises(WrongUse, match="augment is `rotate`"):
        ImageCourse(torch.zeros(4, 3, 8, 8), augment="rotate")
    with pytest.raises(BadInput, match="4 inputs and 3 labels"):
        ImageCourse(torch.zeros(4, 3), torch.zeros(3))
