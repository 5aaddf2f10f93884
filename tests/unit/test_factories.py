"""Networks opened by name: factories, their arguments, their weights, exported programs."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lighten.errors import BadInput, MissingPackage, UserError, WrongUse
from lighten.factories import Factory, example_images, open_network
from lighten.network_weights import load_weights, read_weights

CODE = """
import torch
from torch import nn
from beside import HIDDEN

class Net(nn.Module):
    def __init__(self, width=1.0, classes=3):
        super().__init__()
        hidden = int(HIDDEN * width)
        self.conv = nn.Conv2d(3, hidden, 3, padding=1)
        self.norm = nn.BatchNorm2d(hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))

def net(width=1.0, *, classes=3):
    return Net(width, classes)

def with_inputs():
    return Net(), torch.zeros(4, 3, 5, 5)

def broken():
    raise RuntimeError("no luck")

def needy():
    import surely_not_installed

made = Net()
number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with models.py in it; what is imported from it is forgotten after."""
    (tmp_path / "models_of_a_user.py").write_text(CODE)
    (tmp_path / "beside.py").write_text("HIDDEN = 8\n")
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


FILE, MODULE = "models_of_a_user.py", "models_of_a_user"


@pytest.mark.parametrize("home", [FILE, MODULE])
def test_a_factory_is_found_by_file_and_by_module(folder: Path, home: str) -> None:
    network = open_network(f"{home}:net", size=8)
    assert network(torch.zeros(5, 3, 8, 8)).shape == (5, 3)
    assert not network.module.training
    assert network.source == f"{home}:net"


def test_a_factory_takes_literals(folder: Path) -> None:
    network = open_network(f"{FILE}:net(width=0.5, classes=7)", size=8)
    assert network.module.conv.weight.shape[0] == 4
    assert network(torch.zeros(1, 3, 8, 8)).shape == (1, 7)
    assert open_network(f"{FILE}:Net(2.0)", size=8).module.conv.weight.shape[0] == 16


def test_a_factory_may_give_inputs_and_a_module_may_be_there_already(folder: Path) -> None:
    assert open_network(f"{FILE}:with_inputs").inputs[0].shape == (4, 3, 5, 5)
    assert open_network(f"{FILE}:with_inputs", size=9).inputs[0].shape == (2, 3, 9, 9)
    assert open_network(f"{FILE}:made", inputs=torch.zeros(2, 3, 4, 4)).parameters == 3 * 72 + 51


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        ("models_of_a_user.py", WrongUse, "names no factory"),
        ("absent.py:net", WrongUse, "no file absent.py"),
        ("absent.module:net", WrongUse, "no module `absent`"),
        (f"{MODULE}.inner:net", WrongUse, "no module `models_of_a_user.inner`"),
        (f"{FILE}:nett", WrongUse, "did you mean `net`"),
        (f"{FILE}:qqqq", WrongUse, "it has Net, net, with_inputs"),
        (f"{FILE}:net(depth=3)", WrongUse, r"width=1.0, \*, classes=3"),
        (f"{FILE}:net(width=open('x'))", WrongUse, "cannot be read"),
        (f"{FILE}:net(**{{'width': 1}})", WrongUse, "cannot be read"),
        (f"{FILE}:net(1)+(2)", WrongUse, "not a call"),
        (f"{FILE}:number", WrongUse, "is a int"),
        (f"{FILE}:made(3)", WrongUse, "a module already"),
        (f"{FILE}:broken", BadInput, "RuntimeError: no luck .in models_of_a_user.py, line"),
        (f"{FILE}:needy", MissingPackage, "surely_not_installed"),
        (f"{FILE}:net", WrongUse, "what .* is called with"),
        ("fractions:Fraction", WrongUse, "gives a Fraction, not a torch.nn.Module"),
    ],
)
def test_a_mistake_is_named(folder: Path, source: str, kind: type[UserError], words: str) -> None:
    with pytest.raises(kind, match=words):
        open_network(source)


def test_a_file_that_fails_is_not_half_imported(folder: Path) -> None:
    (folder / "bad.py").write_text("net = 1\nraise ValueError('half')\n")
    for _ in range(2):
        with pytest.raises(BadInput, match="ValueError: half"):
            open_network("bad.py:net", size=8)
    (folder / "lacking.py").write_text("import surely_not_installed\n")
    for home in ("lacking.py", "lacking"):
        with pytest.raises(MissingPackage, match="surely_not_installed"):
            open_network(f"{home}:net", size=8)


def test_examples_are_random_and_the_same_each_time() -> None:
    a, b = example_images(4), example_images(4)
    assert torch.equal(a, b)
    assert a.std() > 0.5
    assert example_images((7,)).shape == (2, 7)
    with pytest.raises(WrongUse, match="shape"):
        example_images(0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)
        self.outer = nn.Linear(4, 4, bias=False)
        self.outer.weight = self.inner.weight
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.outer(self.inner(x)))


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        k: torch.rand_like(v) if v.is_floating_point() else v + 7
        for k, v in module.state_dict().items()
    }


def save_torch(value: object, path: Path) -> None:
    torch.save(value, path)


@pytest.mark.parametrize(
    ("suffix", "nested"),
    [(".safetensors", None), (".pt", None), (".pth", "state_dict"), (".pt", "model")],
)
@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod."])
def test_weights_are_read_in_each_form(
    tmp_path: Path,
    suffix: str,
    nested: str | None,
    prefix: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    stored = {prefix + k: v for k, v in state(net).items()}
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(stored, path)
    else:
        save_torch(stored if nested is None else {nested: stored, "epoch": 3}, path)
    load_weights(net, read_weights(path), str(path))
    for name, value in net.state_dict().items():
        assert torch.equal(value, stored[prefix + name])
    said = capsys.readouterr().err
    assert ("prefix" in said) == bool(prefix)
    assert ("under" in said) == bool(nested)


def test_tied_weights_and_counters_may_be_absent() -> None:
    net = Tied()
    given = state(net)
    del given["outer.weight"], given["norm.num_batches_tracked"]
    load_weights(net, given, "w")
    assert torch.equal(net.outer.weight, given["inner.weight"])


def drop(s: dict[str, torch.Tensor]) -> None:
    s["0.wieght"] = s.pop("0.weight")


def widen(s: dict[str, torch.Tensor]) -> None:
    s["0.weight"] = torch.zeros(5, 3)


def add(s: dict[str, torch.Tensor]) -> None:
    s.update({f"extra.{i}": torch.zeros(1) for i in range(9)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, "1 missing: `0.weight` .nearest: `0.wieght`.; 1 unexpected: `0.wieght`"),
        (widen, "`0.weight` is .5, 3., not .2, 3."),
        (add, "9 unexpected: `extra.0`, `extra.1`, `extra.2` and 6 more"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    change: Callable[[dict[str, torch.Tensor]], None], words: str
) -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    given = state(net)
    change(given)
    with pytest.raises(BadInput, match=words):
        load_weights(net, given, "w.pt")
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_rounding_on_loading_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Linear(3, 2).half()
    load_weights(net, {k: v.float() for k, v in state(net).items()}, "w")
    assert "from float32 to float16" in capsys.readouterr().err
    load_weights(nn.Linear(3, 2), state(net), "w")
    assert capsys.readouterr().err == ""


def test_no_pickle_is_run_for_weights(tmp_path: Path) -> None:
    path = tmp_path / "whole.pt"
    save_torch(nn.Linear(2, 2), path)
    with pytest.raises(BadInput, match="tensors alone") as caught:
        read_weights(path)
    assert "state_dict()" in caught.value.hint


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"PK\x03\x04 not a zip"])
def test_damaged_weights_are_said_to_be(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput):
        read_weights(tmp_path / name)


def test_weights_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="no weights file"):
        read_weights(tmp_path / "w.pt")
    (tmp_path / "w.txt").write_text("")
    with pytest.raises(WrongUse, match="that lighten knows"):
        read_weights(tmp_path / "w.txt")
    save_torch({"epoch": 3, "loss": 0.1}, tmp_path / "w.pt")
    with pytest.raises(BadInput, match="a dict of `epoch`, `loss`"):
        read_weights(tmp_path / "w.pt")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    ).eval()
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    torch.export.save(torch.export.export(net, (torch.randn(2, 3, 8, 8),), strict=False), path)
    return path, net


def test_an_exported_program_is_a_network(program: tuple[Path, nn.Module]) -> None:
    path, net = program
    network = open_network(str(path))
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(network(x), net(x), atol=1e-6)
    assert [layer.name for layer in network.layers] == ["0.weight", "4.weight"]
    assert set(network.module.state_dict()) == set(net.state_dict())


def rewritten(path: Path, out: Path, change: Callable[[str, bytes], bytes]) -> Path:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out


class Trap:
    """Unpickling it leaves a mark."""

    mark: Path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.mark), "w")


def test_no_pickle_is_run_for_a_program(program: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, _ = program
    Trap.mark = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save(Trap(), buffer)

    def as_pickle(name: str, content: bytes) -> bytes:
        if name.endswith("weights_config.json"):
            config = json.loads(content)
            config["config"]["0.weight"]["use_pickle"] = True
            return json.dumps(config).encode()
        return buffer.getvalue() if name.endswith("/weight_0") else content

    def as_inputs(name: str, content: bytes) -> bytes:
        return buffer.getvalue() if "sample_inputs" in name else content

    for i, change in enumerate((as_pickle, as_inputs)):
        with pytest.raises(BadInput, match="pickle"):
            open_network(str(rewritten(path, tmp_path / f"{i}.pt2", change)))
    assert not Trap.mark.exists()


def test_a_damaged_program_is_said_to_be(program: tuple[Path, nn.Module], tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="no file"):
        open_network("absent.pt2")
    bad = tmp_path / "bad.pt2"
    bad.write_bytes(program[0].read_bytes()[:500])
    with pytest.raises(BadInput):
        open_network(str(bad))


def test_a_factory_reads_as_it_was_written() -> None:
    found = Factory.parse("a.b:c(1, 'x', k=[2])")
    assert (found.home, found.name) == ("a.b", "c")
    assert (found.arguments, found.options) == ((1, "x"), {"k": [2]})
