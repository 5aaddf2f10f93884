"""The page of a model that nothing was done to: its map, and which budgets can be reached.

write("resnet.html", "models.py:resnet20", size=32)
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from lighten import front
from lighten.coupling import couple
from lighten.curves import curves
from lighten.errors import WrongUse
from lighten.inspect import inspect_model
from lighten.inspect_network import inspect_network
from lighten.look import untouched
from lighten.look.network_axes import axes
from lighten.look.provenance import machine, versions
from lighten.model import open_model
from lighten.network import Network
from lighten.progress import note, stage
from lighten.report.facts import Facts
from lighten.report.page import render, save
from lighten.report.words import Phrase
from lighten.widths import Curve

EXAMPLES = 128
"""That sensitivities are previewed on."""


def write(
    path: str | Path | None, model: Any, example_inputs: Any = None, *,
    weights: str | Path | None = None, size: int | None = None, data: Any = None,
    mean: Any = None, std: Any = None, lang: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the page of a network or a language model; returns what `inspect` prints of it.

    data: of networks, what sensitivities are previewed on; without, they are left out. For the
    others see lighten.compress; raises UserError.
    """
    if path is None:
        raise WrongUse("data, mean and std are for a page's sensitivities", "--html FILE")
    if front.is_network(model):
        network = front.opened(model, example_inputs, weights, size)
        seen = None
        if data is not None:
            read = front.loaded(data, network, size=size, mean=mean, std=std, crop=None)
            seen = front.calibration(read, network, EXAMPLES)
        found, facts = of_network(network, seen)
    else:
        for name, value in {"data": data, "mean": mean, "std": std}.items():
            if value is not None:
                raise WrongUse(f"{name} is for networks, and {model} is a language model")
        found, facts = of_language_model(str(model))
    options = {"weights": weights, "size": size, "data": data, "mean": mean, "std": std}
    words = ["lighten", "inspect", str(found.request["source"])]
    for name, value in {**options, "html": path}.items():
        if value is not None:
            words += [f"--{name}", f"{value}"]
    origin = {**found.look["provenance"], "command": shlex.join(words)}
    found = replace(found, look={**found.look, "provenance": origin})
    saved = save(render(found, lang), Path(path))
    note(f"a page to look at: {saved}")
    return facts


def of_network(network: Network, data: Any = None) -> tuple[Facts, dict[str, Any]]:
    """What the page shows, and what `inspect` prints. data: (count, ...) inputs that the
    sensitivities are previewed on, or None."""
    with stage("couple channels"):
        couplings = couple(network)
    facts = inspect_network(network, couplings)
    found: dict[str, Curve] = {}
    if data is not None:
        with stage("sensitivity of axes", len(couplings.free), "axes") as tick:
            found = curves(network, couplings, data, tick=tick)
    with stage("look", len(network.layers), "layers") as tick:
        look: dict[str, Any] = {
            "layers": untouched.network_layers(network, couplings, found, tick),
            "axes": axes(network, couplings),
        }
    notes = [Phrase("note.preview_error"), Phrase("note.least_network")]
    if found:
        look["curve"] = untouched.network_budgets(network, couplings, found)
        notes.insert(1, Phrase("note.preview_sensitivity"))
    least = {
        "bytes": round(facts["smallest_parameters"] / 2),
        "parameters": facts["smallest_parameters"],
        "macs": facts["smallest_macs"],
    }
    metrics = {"before": untouched.now_of(network), "after": least, "notes": facts["notes"]}
    about = {"source": network.source, "digest": network.digest,
             "kind": type(network.module).__name__}  # fmt: skip
    return _facts(about, metrics, look, notes), facts


def of_language_model(source: str) -> tuple[Facts, dict[str, Any]]:
    """The same. Every layer is read once; nothing is run."""
    model = open_model(source)
    with stage("look", len(model.layers), "layers") as tick:
        layers = untouched.text_layers(model, tick)
    least, format = untouched.least_of_text(model)
    bytes_ = sum(tensor.nbytes for tensor in model.tensors.values())
    count = model.parameters
    metrics = {
        "before": {"bytes": bytes_, "parameters": count, "bits_per_weight": 8 * bytes_ / count},
        "after": {"bytes": least, "parameters": count, "bits_per_weight": 8 * least / count},
        "notes": list(model.notes),
    }
    notes = [Phrase("note.preview_error"), Phrase("note.least_text", {"format": format})]
    about = {"source": model.source, "digest": model.digest, "kind": model.kind}
    return _facts(about, metrics, {"layers": layers}, notes), inspect_model(source)


def _facts(
    about: dict[str, Any], metrics: dict[str, Any], look: dict[str, Any], notes: list[Phrase]
) -> Facts:
    origin = {"model": about, "versions": versions(), "machine": machine()}
    return Facts(
        name=str(about["source"]), kind="model", request={"source": about["source"]},
        metrics=metrics, look={**look, "provenance": origin}, notes=notes,
    )  # fmt: skip
