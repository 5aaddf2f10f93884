"""What is kept of a network to be looked at: layers, axes, the curve, confusions, pictures."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lighten import inspect_page
from lighten.cli import main
from lighten.coupling import Couplings, couple
from lighten.inspect_network import inspect_network
from lighten.look.network import call, command
from lighten.look.network_axes import axes
from lighten.look.network_curve import curve, nats, other_budgets, trust
from lighten.look.network_differences import CLASSES, WORST, confusion, differences
from lighten.look.network_layers import Told, importance, layers
from lighten.look.pictures import SIDE as SHOWN
from lighten.look.pictures import are_pictures, picture, png
from lighten.mixture import quantize_mixed
from lighten.network import Network
from lighten.samples import Samples
from lighten.shrink import shrink
from lighten.types import Plan, Spec
from lighten.widths import Curve, keep_of
from patterns import PATTERNS
from small_networks import SIDE, Plain, Residual, images, trained

WIDTHS = {"conv1.weight": 9}
INT4 = "int4_channel_sym"


@pytest.fixture(scope="module")
def network() -> Network:
    return Network.of(trained(Residual), images(2))


@pytest.fixture(scope="module")
def couplings(network: Network) -> Couplings:
    return couple(network)


def curves(couplings: Couplings) -> dict[str, Curve]:
    """Units go from the last to the first; each that goes doubles the loss."""
    found = {}
    for axis in couplings.free:
        error = 2.0 ** -torch.arange(axis.width + 1, dtype=torch.float64)
        error[0], error[axis.width] = torch.inf, 0
        found[axis.name] = Curve(torch.arange(axis.width).flip(0), error)
    return found


@pytest.fixture(scope="module")
def told(couplings: Couplings) -> Told:
    return Told(curves(couplings), {"conv2.weight": {INT4: 0.25}})


def rows_of(
    network: Network, couplings: Couplings, told: Told, plan: Plan, *, rounded: bool = True
) -> dict[str, dict[str, Any]]:
    small = shrink(network, couplings, keep_of(told.curves, plan.widths))
    specs = {name: Spec.parse(text) for name, text in plan.specs.items()}
    made = quantize_mixed(small, images(8), specs, quick=True) if rounded else small
    found = layers(network, small, made, couplings, plan, told)
    json.dumps(found, allow_nan=False)
    return {row["name"]: row for row in found}


# -- layers -------------------------------------------------------------------------------------
def test_layers_of_a_narrowed_and_rounded_network(
    network: Network, couplings: Couplings, told: Told
) -> None:
    formats = {"conv1.weight": "int8_channel_sym", "conv2.weight": INT4}
    specs = {name: str(Spec(format, activations="8")) for name, format in formats.items()}
    plan = Plan(specs, WIDTHS)
    rows = rows_of(network, couplings, told, plan)
    assert list(rows) == [layer.name for layer in network.layers]
    for name, width in plan.widths.items():
        assert rows[name]["width"] == {"kept": width, "of": 16, "axis": name}
    for layer in network.layers:
        row = rows[layer.name]
        assert len(row["histogram"]["edges"]) == 33
        assert sum(row["histogram"]["before"]) == row["parameters_before"] == layer.size
        assert sum(row["histogram"]["after"]) == row["parameters_after"]
        assert row["bytes_before"] == 4 * layer.size
        assert row["bits"] == 8 * row["bytes_after"] / row["parameters_after"]
    first, second, head = (rows[f"{n}.weight"] for n in ("conv1", "conv2", "head"))
    assert first["parameters_after"] == second["parameters_after"] == 9 * 16 * 9
    assert first["macs_after"] * 16 == first["macs_before"] * 9
    assert (first["format"], second["format"], head["format"]) == ("int8", "int4", "f32")
    assert 8 <= first["bits"] < 9
    assert head["bytes_after"] == head["bytes_before"]
    assert 0 < first["error"] < second["error"] < 0.5
    assert "error" not in head
    assert first["grid"] is None
    assert len(second["grid"]) <= 16
    assert first["range"]["low"] <= 0 < first["range"]["high"]
    assert first["range"]["bits"] == 8
    assert first["sensitivity"] == pytest.approx(2.0**-9)  # of its width
    assert second["sensitivity"] == 0.25  # of its format
    assert head["sensitivity"] is None
    assert first["importance"]["kept"] == [1] * 9 + [0] * 7


def test_layers_of_a_network_that_is_only_narrowed(
    network: Network, couplings: Couplings, told: Told
) -> None:
    rows = rows_of(network, couplings, told, Plan({}, WIDTHS), rounded=False)
    state = network.module.state_dict()
    row = rows["stem.weight"]
    assert row["histogram"]["before"] == row["histogram"]["after"]
    assert row["histogram"]["edges"][0] >= float(state["stem.weight"].min()) - 1e-3
    assert row["width"] == {"kept": 16, "of": 16, "axis": "stem.weight"}
    assert row["sparsity"] is None
    assert {row["format"] for row in rows.values()} == {"f32"}


def test_outputs_of_several_axes_are_counted_together() -> None:
    module, inputs = PATTERNS["padded_shortcut"].make()
    network = Network.of(module, inputs)
    couplings = couple(network)
    widths = {"stem.weight": 3, "d.weight": 2}  # of 4 each, which d.weight writes both
    rows = rows_of(network, couplings, Told(curves(couplings)), Plan({}, widths), rounded=False)
    assert (rows["d.weight"]["width"]["kept"], rows["d.weight"]["width"]["of"]) == (5, 8)
    assert rows["d.weight"]["parameters_after"] == 5 * 6 * 9
    assert rows["stem.weight"]["width"] == {"kept": 3, "of": 4, "axis": "stem.weight"}


def test_a_depthwise_convolution_is_called_so() -> None:
    network = Network.of(trained(Plain), images(2))
    found = rows_of(network, couple(network), Told(), Plan({}), rounded=False)
    assert [row["kind"] for row in found.values()] == ["conv", "depthwise", "conv", "linear"]
    assert {row["block"] for row in found.values()} == {"body", None}
    assert all(row["importance"] is None for row in found.values())


def test_importance_says_who_stays() -> None:
    lost = torch.tensor([torch.inf, 3.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    found = importance(Curve(torch.tensor([2, 0, 3, 1]), lost), 2)
    assert found == {"scores": [1.0, 3.0, 0.5, 3.0], "kept": [0, 1, 0, 1]}
    assert importance(None, 2) is None


# -- axes, curve --------------------------------------------------------------------------------
def test_axes_tell_the_widths_of_the_plan(network: Network, couplings: Couplings) -> None:
    found = {row["name"]: row for row in axes(network, couplings, WIDTHS)}
    json.dumps(list(found.values()), allow_nan=False)
    assert {name for name, row in found.items() if not row["locked"]} == {
        axis.name for axis in couplings.free
    }
    inner = found["conv1.weight"]
    assert (inner["size"], inner["kept"]) == (16, 9)
    assert (inner["writers"], inner["readers"]) == (["conv1.weight"], ["conv2.weight"])
    stream = found["stem.weight"]
    assert (stream["size"], stream["kept"]) == (16, 16)
    assert set(stream["writers"]) == {"stem.weight", "conv2.weight"}
    assert 0 < inner["macs_share"] < stream["macs_share"] <= 1


def test_the_curve_has_what_was_measured_and_what_is_predicted(
    network: Network, couplings: Couplings
) -> None:
    known = curves(couplings)
    metrics = {
        "before": {"bytes": 4000, "macs": 100, "parameters": 1000, "accuracy": 0.9},
        "after": {"bytes": 1000, "macs": 50, "parameters": 500, "mean_kld": 0.02, "accuracy": 0.8},
        "plan": "allocated",
        "plans": [
            {"plan": "allocated", "chosen": "yes", "macs": 50, "mean_kld": {"value": 0.01}},
            {"plan": "uniform", "chosen": "", "macs": 49, "mean_kld": {"value": 0.04}},
        ],
    }
    others = other_budgets(network, couplings.free, known)
    assert {row["source"] for row in others} == {"other budget", "uniform"}
    factor = trust(metrics, nats(known, WIDTHS))
    assert factor == pytest.approx(0.01 / 2.0**-9)
    found = curve(metrics, Plan({}, WIDTHS), others, factor)
    json.dumps(found, allow_nan=False)
    assert [p["source"] for p in found[:3]] == ["original", "this plan", "uniform"]
    assert found[0]["mean_kld"] == 0
    predicted = [p for p in found if not p["measured"]]
    assert predicted
    for p in predicted:
        assert p["mean_kld"] == pytest.approx(factor * p["predicted_kld"])
        assert p["bytes"] == 2 * p["parameters"]
    ours = [p for p in predicted if p["source"] == "other budget"]
    assert [p["macs"] for p in ours] == sorted((p["macs"] for p in ours), reverse=True)


# -- differences --------------------------------------------------------------------------------
def held_out(classes: int = 3, labelled: bool = True, count: int = 40) -> Samples:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, 3, 8, 8, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator) if labelled else None
    names = tuple("abc"[:classes])
    return Samples(x[:1], x, labels, "made up", "0", names, ((0.0,), (1.0,)))


def test_confusions_sum_to_the_classes_and_the_worst_come_first() -> None:
    samples = held_out()
    before = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    after = before.clone()
    after[7] = -9 * after[7]
    found = differences(before, after, samples)
    json.dumps(found, allow_nan=False)
    assert found["kind"] == "images"
    assert found["classes"] == ["a", "b", "c"]
    counts = torch.bincount(samples.labels, minlength=3).tolist()
    for side in ("before", "after"):
        assert [sum(row) for row in found["confusion"][side]] == counts
    assert len(found["worst"]) == WORST
    worst = found["worst"][0]
    assert worst["example"] == 7
    assert worst["label"] == int(samples.labels[7])
    assert worst["before"] == int(before[7].argmax())
    assert worst["after"] == int(after[7].argmax())
    assert worst["kld"] > 0 == found["worst"][1]["kld"]
    assert 0 < worst["before_probability"] <= 1


def test_confusion_by_hand() -> None:
    outputs = torch.eye(3)[[0, 1, 1, 2]]
    assert confusion(outputs, torch.tensor([0, 0, 1, 2])) == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_without_labels_the_worst_stay() -> None:
    outputs = torch.randn(40, 3)
    found = differences(outputs, -outputs, held_out(labelled=False))
    assert "confusion" not in found
    assert {row["label"] for row in found["worst"]} == {None}


def test_of_what_is_no_class_or_no_picture_less_is_told() -> None:
    samples = held_out()
    assert differences(torch.zeros(40, 4, 4), torch.zeros(40, 4, 4), samples) == {"kind": "images"}
    rows = Samples(torch.zeros(1, 9), torch.rand(40, 9), None, "rows", "0")
    found = differences(torch.randn(40, 2), torch.randn(40, 2), rows)
    assert found["kind"] == "examples"
    assert not any("png" in row for row in found["worst"])
    many = torch.randn(40, CLASSES + 1)
    assert "confusion" not in differences(many, many, samples)


# -- pictures -----------------------------------------------------------------------------------
def decoded(uri: str) -> torch.Tensor:
    image = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    found = torch.from_numpy(numpy.array(image.open(io.BytesIO(base64.b64decode(data)))))
    return found.permute(2, 0, 1) if found.ndim == 3 else found[None]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_what_was_normalised(channels: int) -> None:
    pixels = torch.randint(256, (channels, 20, 30), dtype=torch.uint8)
    mean, std = (0.5,) * channels, (0.2,) * channels
    x = (pixels / 255 - 0.5) / 0.2
    assert torch.equal(decoded(picture(x, (mean, std))), pixels)
    assert png(pixels) == png(pixels)


def test_pictures_are_small_and_what_is_no_pixel_is_stretched() -> None:
    x = torch.randn(3, 300, 200)
    found = decoded(picture(x, None))
    assert found.shape == (3, SHOWN, 64)
    wide = decoded(picture(torch.linspace(-3, 5, 64).view(1, 8, 8), None))
    assert (int(wide.min()), int(wide.max())) == (0, 255)
    flat = decoded(picture(torch.full((1, 8, 8), 7.0), None))
    assert flat.unique().numel() == 1
    assert not are_pictures((2, 32, 32))
    assert not are_pictures((3, 2, 32))


# -- how it is made again -----------------------------------------------------------------------
def test_the_line_that_makes_a_run() -> None:
    asked = {"model": "net.py:f", "budget": "0.5 macs", "learn_from": "logits:1", "length": 512,
             "seed": 0, "also": None, "sparsity": None}  # fmt: skip
    assert command(asked) == [
        "lighten", "compress", "net.py:f", "--budget", "0.5 macs", "--learn-from", "logits:1",
        "--seed", "0",
    ]  # fmt: skip
    request = {"budget": "25%", "export": "onnx", "quantize": "auto", "sparsity": None}
    assert call(request) == (
        "lighten.compress(model, example_inputs, data=data, budget='25%', export='onnx',"
        " quantize='auto')"
    )


# -- a model that nothing was done to -----------------------------------------------------------
def test_the_page_of_an_untouched_network(network: Network, tmp_path: Path) -> None:
    plain, full = (inspect_page.of_network(network, data)[0] for data in (None, images(16)))
    rows = {row["name"]: row for row in plain.look["layers"]}
    assert list(rows) == [layer.name for layer in network.layers]
    for layer in network.layers:
        assert sum(rows[layer.name]["histogram"]["before"]) == layer.size
        assert "after" not in rows[layer.name]["histogram"]
        assert rows[layer.name]["error_kind"] == "weight4"
        assert 0.01 < rows[layer.name]["error"] < 0.4
        assert rows[layer.name]["sensitivity"] is None
    assert "curve" not in plain.look
    assert all(row["kept"] == row["size"] for row in plain.look["axes"])
    assert plain.metrics["after"]["macs"] < plain.metrics["before"]["macs"]
    assert full.look["layers"][0]["sensitivity"] > 0
    assert any(not point["measured"] for point in full.look["curve"])
    facts = inspect_page.write(tmp_path / "map.html", network)
    assert facts == inspect_network(network)
    page = (tmp_path / "map.html").read_text(encoding="utf-8")
    assert "smallest possible" in page
    assert "conv1.weight" in page


def test_the_page_of_an_untouched_language_model(tiny: Any, tmp_path: Path) -> None:
    folder, path = str(tiny("llama")), tmp_path / "map.html"
    found, _ = inspect_page.of_language_model(folder)
    assert found.look["layers"]
    json.dumps(found.look["layers"], allow_nan=False)
    assert 0 < found.metrics["after"]["bytes"] < found.metrics["before"]["bytes"]
    assert main(["inspect", folder, "--html", str(path)]) == 0
    assert "smallest possible" in path.read_text(encoding="utf-8")


def test_data_without_a_page_is_refused(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "net.py:f", "--size", str(SIDE), "--mean", "0.5"]) == 2
    assert "--html" in capsys.readouterr().err
    assert main(["inspect", str(tiny("llama")), "--html", "x.html", "--mean", "0.5"]) == 2
    assert "for networks" in capsys.readouterr().err
    assert not Path("x.html").exists()


def test_the_preview_finds_formats_that_nobody_has_asked_for_yet() -> None:
    code = (
        "import torch; from lighten.look.untouched import FOUR_BITS, rounded_to_four as f;"
        "print(f(torch.randn(8, 64), FOUR_BITS[-1:]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < float(found.stdout) < 0.5
