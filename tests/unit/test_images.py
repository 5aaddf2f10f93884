"""Images to calibrate and measure on: every layout, the same pixels, and mistakes by name."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lighten.errors import BadInput, MissingPackage, UserError, WrongUse
from lighten.images import load_images

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

COUNT, SIDE = 12, 6
NAMES = ("cat", "dog", "emu")


def pixels(seed: int = 0, shape: tuple[int, ...] = (COUNT, SIDE, SIDE, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(array: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def files() -> dict[str, bytes]:
    """Path -> content: image i is of class i % 3, in the order of its path."""
    return {f"{NAMES[i % 3]}/{i:02}.png": png(x) for i, x in enumerate(pixels())}


def as_folder(root: Path) -> Path:
    for name, content in files().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / ".cache").mkdir()
    (root / ".cache" / "x.png").write_bytes(b"hidden")
    (root / "notes.txt").write_text("not an image")
    return root


def as_zip(root: Path) -> Path:
    path = root / "all.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files().items():
            archive.writestr(f"set/{name}", content)
        archive.writestr("__MACOSX/set/cat/._00.png", b"junk")
    return path


def write_parquet(path: Path, columns: dict[str, list[Any]], names: Any = None, **kw: Any) -> Path:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table(columns)
    if names:
        facts = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(facts)})
    pq.write_table(table, path, **kw)
    return path


def rows(column: str = "image", label: str = "label") -> dict[str, list[Any]]:
    order = sorted(files())
    content = files()
    return {
        column: [{"bytes": content[n], "path": n} for n in order],
        label: [NAMES.index(n.split("/")[0]) for n in order],
    }


def as_parquet(root: Path) -> Path:
    return write_parquet(root / "a.parquet", rows(), NAMES, row_group_size=5)


def as_arrays(root: Path) -> Path:
    order = [int(n[4:6]) for n in sorted(files())]
    path = root / "a.npz"
    np.savez(path, x=pixels()[order], y=np.array(order) % 3)
    return path


LAYOUTS = {"folder": as_folder, "zip": as_zip, "parquet": as_parquet, "npz": as_arrays}


def expected() -> tuple[torch.Tensor, torch.Tensor]:
    order = [int(n[4:6]) for n in sorted(files())]
    return torch.from_numpy(pixels()[order]).permute(0, 3, 1, 2), torch.tensor(order) % 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images(layout: str, tmp_path: Path) -> None:
    images = load_images(LAYOUTS[layout](tmp_path), mean="imagenet", seed=None)
    raw, labels = expected()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (raw / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    for _ in range(2):  # decoded, then from memory
        assert torch.allclose(images.tensor(), x, atol=1e-6)
    assert torch.equal(images.labels(), labels)
    assert images.labelled
    assert images.shape == (3, SIDE, SIDE)
    assert images.classes == (() if layout == "npz" else NAMES)
    assert torch.equal(images.tensor([3, 1]), images.tensor()[[3, 1]])
    assert torch.equal(images.tensor(slice(2, 5)), images.tensor()[2:5])
    assert torch.equal(torch.cat(list(images.batches(5))), images.tensor())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sets_are_disjoint_and_the_same_each_time(layout: str, tmp_path: Path) -> None:
    path = LAYOUTS[layout](tmp_path)
    first, second = load_images(path, limit=5), load_images(path, limit=7, offset=5)
    assert sorted(first.rows.tolist() + second.rows.tolist()) == list(range(COUNT))
    assert first.digest == load_images(path, limit=5).digest
    assert len({first.digest, second.digest, load_images(path, limit=5, seed=1).digest}) == 3
    assert first.digest != load_images(path, limit=5, mean="half").digest
    whole = load_images(path)
    a, b = whole.split(4, 6)
    assert not set(a.rows.tolist()) & set(b.rows.tolist())
    assert (len(a), b.count) == (4, 6)
    assert torch.equal(whole.split(4, 6)[1].rows, b.rows)
    assert not torch.equal(whole.split(4, 6, seed=3)[1].rows, b.rows)
    with pytest.raises(WrongUse, match="7 images to calibrate on and 6 to test on, of 12"):
        whole.split(7, 6)


def test_a_few_images_are_not_all_of_the_first_class(tmp_path: Path) -> None:
    labels = load_images(as_folder(tmp_path), limit=6).labels()
    assert labels is not None
    assert len(set(labels.tolist())) > 1


@pytest.mark.parametrize("random", [True, False])
def test_a_large_table_is_read_front_to_back(
    random: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_parquet(tmp_path)
    if not random:
        monkeypatch.setattr("lighten.image_tables._MEMORY", 1)
    images = load_images(path, limit=9)
    assert (images.rows.sort().values.tolist() == images.rows.tolist()) != random
    raw, labels = expected()
    assert torch.allclose(images.tensor() * 255, raw[images.rows].float(), atol=1e-3)
    assert torch.equal(images.labels(), labels[images.rows])


def test_pixels_in_memory_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = 3 * SIDE * SIDE
    monkeypatch.setattr("lighten.images._MEMORY", 4 * one)
    images = load_images(as_folder(tmp_path), seed=None)
    assert torch.equal((images.tensor() * 255).round().byte(), expected()[0])
    assert len(images.store._kept) == 4
    assert all(x.dtype == np.uint8 for x in images.store._kept.values())


def test_loose_images_have_no_labels(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.PNG").write_bytes(png(pixels()[i]))
    images = load_images(tmp_path)
    assert images.labels() is None
    assert not images.labelled
    assert images.classes == ()
    assert len(images) == 3


@pytest.mark.parametrize(
    ("crop", "expect"),
    [("center", (8, 8, 24, 24)), ("squash", (0, 0, 32, 32)), ("0.5", (12, 12, 20, 20))],
)
def test_a_square_is_taken_from_the_middle(
    crop: str, expect: tuple[int, int, int, int], tmp_path: Path
) -> None:
    """A picture 32 wide whose columns say where they are; only their share of it is left."""
    wide = np.zeros((16, 32, 3), np.uint8)
    wide[:, :, 0] = np.arange(32) * 8
    (tmp_path / "a.png").write_bytes(png(wide))
    x = load_images(tmp_path, size=16, crop=crop).tensor()[0, 0] * 255 / 8
    left, _, right, _ = expect
    step = (right - left) / 16
    middle = left + step * (torch.arange(16) + 0.5) - 0.5
    assert torch.allclose(x[:, 2:-2], middle[2:-2].expand(16, 12), atol=0.3)


def test_resizing_is_that_of_torchvision(tmp_path: Path) -> None:
    """256 on the shorter side, then the middle 224: as torchvision's Resize and CenterCrop do."""
    photo = Image.fromarray(pixels(3, (40, 61, 3))).resize((511, 320))
    photo.save(tmp_path / "a.png")
    resized = photo.resize((int(256 * 511 / 320), 256), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 224) / 2), 16
    want = np.array(resized.crop((left, top, left + 224, top + 224)))
    found = load_images(tmp_path, size=224, crop="0.875").tensor()[0]
    assert torch.equal((found * 255).round().byte(), torch.from_numpy(want).permute(2, 0, 1))


def test_grey_and_colour(tmp_path: Path) -> None:
    grey, colour = tmp_path / "grey", tmp_path / "colour"
    for folder, x in ((grey, pixels()[0][:, :, 0]), (colour, pixels()[0])):
        folder.mkdir()
        (folder / "a.png").write_bytes(png(x))
        np.savez(folder / "a.npz", x=x[None])
    for form in ("", "a.npz"):
        one, three = load_images(grey / form), load_images(grey / form, channels=3)
        assert one.shape[0] == 1
        assert torch.equal(three.tensor(), one.tensor().expand(-1, 3, -1, -1))
        assert load_images(colour / form).shape[0] == 3
    file = load_images(colour, channels=1).tensor()
    assert file.shape[1] == 1
    assert torch.equal(load_images(colour / "a.npz", channels=1).tensor(), file)
    with pytest.raises(WrongUse, match="--mean has 3 numbers, the images have 1"):
        load_images(grey, mean="imagenet").tensor()
    (grey / "b.png").write_bytes(png(pixels()[0]))
    with pytest.raises(BadInput, match=r"b.png and a.png have 3 and 1 channels"):
        load_images(grey).tensor()
    (colour / "b.png").write_bytes(png(pixels()[0][:, :, 0]))
    with pytest.raises(BadInput, match="channels"):
        load_images(colour).tensor()
    assert load_images(colour, channels=3).tensor().shape[1] == 3


def test_palettes_and_alpha_are_colours(tmp_path: Path) -> None:
    picture = Image.fromarray(pixels()[0])
    picture.convert("P").save(tmp_path / "a.png")
    picture.convert("RGBA").save(tmp_path / "b.png")
    assert load_images(tmp_path).tensor().shape == (2, 3, SIDE, SIDE)
    Image.fromarray(np.zeros((6, 6), np.uint16)).save(tmp_path / "c.png")
    with pytest.raises(BadInput, match=r"c.png has more than 8 bits"):
        load_images(tmp_path).tensor()


def test_floats_are_taken_as_they_are(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    np.savez(tmp_path / "a.npz", data=x, labels=np.arange(5))
    images = load_images(tmp_path / "a.npz", seed=None)
    assert torch.equal(images.tensor(), torch.from_numpy(x))
    assert images.shape == (7,)
    x[3, 2] = np.nan
    np.savez(tmp_path / "a.npz", data=x)
    with pytest.raises(BadInput, match=r"a.npz.3. holds NaN"):
        load_images(tmp_path / "a.npz")


def test_arrays_with_channels_first_and_labels_as_a_column(tmp_path: Path) -> None:
    x = pixels()
    np.savez(tmp_path / "a.npz", images=x.transpose(0, 3, 1, 2), labels=np.zeros((COUNT, 1), int))
    images = load_images(tmp_path / "a.npz", seed=None)
    assert torch.equal((images.tensor() * 255).round().byte(), torch.from_numpy(x).movedim(3, 1))
    assert load_images(tmp_path / "a.npz", size=3).shape == (3, 3, 3)


@pytest.mark.parametrize("column", ["img", "photo"])
@pytest.mark.parametrize("label", ["label", "species"])
def test_columns_are_found_by_type(column: str, label: str, tmp_path: Path) -> None:
    columns = {"id": [f"n{i}" for i in range(COUNT)], **rows(column, label)}
    images = load_images(write_parquet(tmp_path / "a.parquet", columns), seed=None)
    assert torch.equal(images.labels(), expected()[1])
    plain = {column: [r["bytes"] for r in columns[column]], label: [NAMES[i] for i in
             columns[label]]}  # fmt: skip
    images = load_images(write_parquet(tmp_path / "b.parquet", plain), seed=None)
    assert torch.equal((images.tensor() * 255).round().byte(), expected()[0])
    assert images.classes == (NAMES if label == "label" else ())


def test_several_tables_are_one(tmp_path: Path) -> None:
    all_rows = rows()
    for i, part in enumerate((slice(0, 7), slice(7, COUNT))):
        write_parquet(
            tmp_path / f"train-{i:05}-of-00002.parquet", {k: v[part] for k, v in all_rows.items()}
        )
    images = load_images(tmp_path, seed=None)
    assert torch.equal((images.tensor() * 255).round().byte(), expected()[0])
    assert torch.equal(images.labels(), expected()[1])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", all_rows)
    with pytest.raises(WrongUse, match="the parts test, train"):
        load_images(tmp_path)


def empty_folder(root: Path) -> Path:
    return root


def two_parts(root: Path) -> Path:
    for part in ("train", "test"):
        as_folder(root / part)
    return root


def mixed(root: Path) -> Path:
    (as_folder(root) / "loose.png").write_bytes(png(pixels()[0]))
    return root


def both_kinds(root: Path) -> Path:
    as_folder(root)
    write_parquet(root / "a.parquet", rows())
    return root


def text(root: Path) -> Path:
    (root / "a.csv").write_text("x")
    return root / "a.csv"


def bad_bytes(name: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        (root / name).write_bytes(b"PK\x03\x04 not really")
        return root / name

    return make


def arrays(**given: Any) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        np.savez(root / "a.npz", **given)
        return root / "a.npz"

    return make


def table(**given: list[Any]) -> Callable[[Path], Path]:
    return lambda root: write_parquet(root / "a.parquet", given)


def high_label(root: Path) -> Path:
    return write_parquet(root / "a.parquet", {**rows(), "label": [0] * 11 + [3]}, NAMES)


ONE = {"bytes": b"x", "path": None}


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda root: root / "absent", WrongUse, "no data at"),
        (empty_folder, BadInput, "no image in it"),
        (two_parts, WrongUse, "the parts test, train"),
        (mixed, BadInput, "loose images beside folders of them, such as loose.png"),
        (both_kinds, BadInput, "Parquet files and images"),
        (text, BadInput, "no image data that lighten knows"),
        (bad_bytes("a.zip"), BadInput, "no zip file"),
        (bad_bytes("a.npz"), BadInput, "plain arrays"),
        (bad_bytes("a.parquet"), BadInput, "no Parquet file"),
        (arrays(z=pixels()), BadInput, "has the arrays z, none with images"),
        (arrays(x=np.array([{}, []], object)), BadInput, "plain arrays"),
        (arrays(x=pixels()[:0]), BadInput, "no image in it"),
        (arrays(x=pixels().astype(np.int32)), BadInput, "int32 of shape"),
        (arrays(x=pixels(0, (3, 4, 4, 2))), BadInput, "shape .4, 4, 2."),
        (arrays(x=pixels(), y=np.zeros(3, int)), BadInput, "12 images and 3 labels"),
        (arrays(x=pixels(), y=np.zeros(12)), BadInput, "labels are float64"),
        (arrays(x=pixels(), y=np.arange(12) - 4), BadInput, "label of image 0 is -4"),
        (table(label=[1, 2]), BadInput, "no column of images .label: int64"),
        (table(a=[ONE], b=[ONE]), BadInput, "several: a, b"),
        (table(image=[ONE, ONE], label=[1, None]), BadInput, r"a.parquet\[1\] has no label"),
        (high_label, BadInput, r"a.parquet\[11\] has the label 3, there are 3 classes"),
    ],
)
def test_a_mistake_is_named(
    make: Callable[[Path], Path], kind: type[UserError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=words):
        load_images(make(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "side 0"),
        ({"size": 8, "crop": "middle"}, "crop `middle`"),
        ({"size": 8, "crop": "1.5"}, "crop `1.5`"),
        ({"crop": "0.875"}, "needs a size"),
        ({"channels": 4}, "4 channels"),
        ({"mean": "0.5,0.5"}, "neither one number nor three"),
        ({"mean": "imagnet"}, "`imagnet`"),
        ({"mean": "123.7,116.3,103.5", "std": "imagenet"}, r"not in \[0, 1\]"),
        ({"mean": 0.5, "std": 0.0}, r"not in \(0, 1\]"),
        ({"mean": 0.5}, "--mean is given without --std"),
        ({"std": "0.5"}, "--std is given without --mean"),
        ({"mean": "imagenet", "channels": 1}, "3 numbers for 1 channels"),
        ({"limit": 13}, "has 12 images, 13 from number 0"),
        ({"limit": 5, "offset": 8}, "at most 4"),
        ({"offset": 12}, "from number 12 on, of 12"),
        ({"limit": 0}, "0 images"),
    ],
)
def test_an_option_that_cannot_be(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match=words):
        load_images(as_folder(tmp_path), **options)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    as_folder(tmp_path)
    (tmp_path / "dog" / "01.png").write_bytes(files()["dog/01.png"][:60])
    with pytest.raises(BadInput, match=r"dog/01.png is no image"):
        load_images(tmp_path).tensor()
    columns = rows()
    columns["image"][7] = {"bytes": b"no", "path": None}
    columns["image"][9] = {"bytes": None, "path": "nowhere.png"}
    path = write_parquet(tmp_path.parent / "broken.parquet", columns)
    with pytest.raises(BadInput, match=r"broken.parquet\[7\] is no image"):
        load_images(path, seed=None).tensor([7])
    with pytest.raises(BadInput, match=r"broken.parquet\[9\] holds no image"):
        load_images(path, seed=None).tensor([9])


def test_mixed_sizes_need_a_size(tmp_path: Path) -> None:
    as_folder(tmp_path)
    (tmp_path / "emu" / "99.png").write_bytes(png(pixels(1, (9, 7, 3))))
    with pytest.raises(BadInput, match=r"emu/99.png and cat/00.png have 7 x 9 and 6 x 6") as found:
        load_images(tmp_path).tensor()
    assert "--size" in found.value.hint
    assert load_images(tmp_path, size=6).tensor().shape == (COUNT + 1, 3, 6, 6)


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    images = load_images(as_folder(tmp_path))
    with pytest.raises(WrongUse, match="of 12 was asked for"):
        images.tensor([12])
    assert images.tensor([]).shape == (0, 3, SIDE, SIDE)
    assert torch.equal(images.tensor([-1]), images.tensor([11]))


@pytest.mark.parametrize(("layout", "package"), [("folder", "PIL"), ("parquet", "pyarrow")])
def test_a_missing_package_is_named(
    layout: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = LAYOUTS[layout](tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match="pillow" if package == "PIL" else package):
        load_images(path).tensor()


def test_cifar10_and_photos_are_read(shared: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    images = load_images(shared / "data/cifar10/test.parquet", limit=50)
    assert images.shape == (3, 32, 32)
    assert (
        len(set((images.labels() if images.labels() is not None else torch.empty(0)).tolist())) > 5
    )
    photos = load_images(shared / "data/photos250.parquet", size=224, crop="0.875", limit=3)
    assert photos.tensor().shape == (3, 3, 224, 224)
