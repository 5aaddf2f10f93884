"""Where CIFAR-10 lies, and getting it from its home when asked to.

python examples/cifar10_data.py --download --folder data/cifar10

Its home offers a binary version of fixed-length records: no pickle is involved. What comes out are
two files, train.npz and test.npz, that `lighten compress --data` takes.
*Source:* Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

import numpy as np

from lighten.errors import BadInput, UserError, WrongUse
from lighten.progress import stage

HOME = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
PARTS = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}
RECORD = 1 + 3 * 32 * 32  # the label, then the red, the green and the blue plane


def cifar10(part: str, folder: str | Path | None = None, download: bool = False) -> Path:
    """The file of "train" or "test", for lighten.load_images: in `folder`, or beside the project.

    download: get it where it is not there. Raises UserError.
    """
    if part not in PARTS:
        raise WrongUse(f"CIFAR-10 has no part `{part}`", f"one of {', '.join(PARTS)}")
    root = default_folder() if folder is None else Path(folder).expanduser()
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10"
    places = [root] if folder is not None else [root, beside]
    for place in places:
        for suffix in (".npz", ".parquet"):
            if (place / f"{part}{suffix}").is_file():
                return place / f"{part}{suffix}"
    if not download:
        raise WrongUse(
            f"CIFAR-10 is not in {' or '.join(map(str, places))}",
            "--download gets it from its home (170 MB)",
        )
    fetch(root)
    return root / f"{part}.npz"


def default_folder() -> Path:
    """The user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lighten" / "cifar10"


def fetch(folder: Path, url: str = HOME, md5: str = MD5) -> None:
    """Download, check and convert; each file is whole or absent. Raises BadInput."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".cifar10-") as room:
        archive = Path(room) / "archive.tar.gz"
        found = _download(url, archive)
        if found != md5:
            raise BadInput(
                f"what {url} sent has the MD5 {found}, not {md5}",
                "the download was cut off or the file has changed: try again",
            )
        for part, names in PARTS.items():
            x, y = _records(archive, names)
            made = Path(room) / f"{part}.npz"
            np.savez(made, x=x, y=y)
            made.replace(folder / f"{part}.npz")


def _download(url: str, path: Path) -> str:
    """The MD5 in hex of what was written."""
    sum_ = hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, path.open("wb") as file:
            size = answer.headers.get("Content-Length")
            with stage("download CIFAR-10", int(size) >> 20 if size else None, "MiB") as tick:
                while chunk := answer.read(1 << 20):
                    file.write(chunk)
                    sum_.update(chunk)
                    tick()
    except OSError as error:
        raise BadInput(f"cannot download {url}: {error}", "is there a network?") from error
    return sum_.hexdigest()


def _records(archive: Path, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of some files of the archive, in order."""
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if name in names and (file := tar.extractfile(member)) is not None:
                    contents[name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BadInput(f"the archive cannot be read: {error}", "download it again") from error
    for name in names:
        if not contents.get(name) or len(contents[name]) % RECORD:
            raise BadInput(f"the archive has no whole {name}", "download it again")
    raw = np.frombuffer(b"".join(contents[n] for n in names), np.uint8).reshape(-1, RECORD)
    return raw[:, 1:].reshape(-1, 3, 32, 32), raw[:, 0].astype(np.int64)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Say where CIFAR-10 is, or get it.")
    parser.add_argument("--download", action="store_true", help="from its home, where it is absent")
    parser.add_argument("--folder", help="where it is or goes; default: the user's cache")
    args = parser.parse_args(arguments)
    try:
        for part in PARTS:
            print(cifar10(part, args.folder, args.download))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
