"""The notebook of the CIFAR-10 example is what its script makes, and runs from top to bottom."""

from __future__ import annotations

import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from programs import load

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "cifar10.ipynb"


def test_it_is_what_the_script_makes() -> None:
    for path, text in load(ROOT / "scripts" / "notebook.py").pages().items():
        assert path.read_text(encoding="utf-8") == text, "run: python scripts/notebook.py"


def test_it_holds_no_outputs_and_every_step_has_its_text() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert not any(c["outputs"] or c["execution_count"] for c in code)
    text = "".join("".join(c["source"]) for c in code)
    for verb in ("lighten.prune", "lighten.recover", "lighten.quantize", "lighten.write_onnx"):
        assert verb in text
    kinds = [c["cell_type"] for c in cells]
    assert ("code", "code") not in list(pairwise(kinds))


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """A folder with images of CIFAR-10's form, and weights that have learned nothing."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 512), ("test", 256)):
        y = draw.integers(0, 10, count)
        x = draw.integers(0, 256, (count, 3, 32, 32)) // 2 + 12 * y[:, None, None, None]
        np.savez(tmp_path / f"{part}.npz", x=x.astype(np.uint8), y=y.astype(np.int64))
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        models = load(ROOT / "examples" / "models" / "cifar_resnet.py")
    finally:
        sys.path.pop(0)
    torch.manual_seed(0)
    save_file(models.resnet20().state_dict(), tmp_path / "w.safetensors")
    return tmp_path


@pytest.mark.timeout(900)  # of a busy machine
def test_it_runs(cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime", "lightning", "ipykernel"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package `{package}` is not installed")
    nbclient = pytest.importorskip("nbclient", reason="running a notebook needs nbclient")
    nbformat = pytest.importorskip("nbformat")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book: Any = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    words = ["--quick", "--recover", "2steps", "--data", str(cifar), "--out", str(tmp_path / "out"),
             "--weights", str(cifar / "w.safetensors")]  # fmt: skip
    (settings,) = (c for c in book.cells if "parameters" in c.metadata.get("tags", ()))
    settings.source = f"args = parser().parse_args({words!r})"
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources=where).execute()
    printed = "".join(
        output.text
        for cell in book.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()}
    assert list(rows) == ["accuracy", "original", "pruned", "recovered", "int8"]
    assert float(rows["pruned"][2]) <= 0.5 * float(rows["original"][2])
    assert float(rows["int8"][1]) < 0.4 * float(rows["pruned"][1])
    assert {p.name for p in (tmp_path / "out").glob("*.onnx")} == {
        "original.onnx", "pruned.onnx", "recovered.onnx", "int8.onnx",
    }  # fmt: skip
