"""The public verb that measures: measure(model, against=reference, data=loader)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lighten.errors import WrongUse
from lighten.front import SAMPLES, is_network, opened, read


def measure(
    model: Any,
    example_inputs: Any = None,
    *,
    against: Any = None,
    data: Any = None,
    weights: str | Path | None = None,
    against_weights: str | Path | None = None,
    size: int | None = None,
    mean: Any = None,
    std: Any = None,
    crop: Any = None,
    samples: int | None = None,
    length: int = 512,
    seed: int = 0,
) -> dict[str, Any]:
    """Quality, size and speed of a language model, a network or an .onnx file, beside `against`.

    A network's facts are those of lighten.measure_networks; the two sides may be a file and the
    network that it was made of. weights: of `model`, or where that is a file of `against`, whose
    own are against_weights. samples: windows of text (64), or examples (2048). Raises UserError.
    """
    from lighten.measure_networks import is_file, measure_networks, subject

    sides = [model] if against is None else [model, against]
    networks = [is_network(side) or is_file(side) for side in sides]
    if not any(networks):
        for name, value in {
            "weights": weights, "against_weights": against_weights, "size": size, "mean": mean,
            "std": std, "crop": crop,
        }.items():  # fmt: skip
            if value is not None:
                raise WrongUse(f"{name} is for networks, and {model} is a language model")
        from lighten.measure import measure_model

        return measure_model(
            model, against=against, data=data, length=length, seed=seed,
            samples=SAMPLES["windows"] if samples is None else samples,
        )  # fmt: skip
    if not all(networks):
        raise WrongUse(
            f"{model} and {against} are a network and a language model",
            "a network is package.module:factory, file.py:factory, a .pt2 or an .onnx file",
        )
    if data is None:
        raise WrongUse("a network is measured on data", "--data images.parquet, or a folder")
    if is_file(model) and against_weights is None:
        weights, against_weights = None, weights
    made = [
        subject(side if is_file(side) else opened(side, example_inputs, own, size))
        for side, own in zip(sides, (weights, against_weights), strict=False)
    ]
    found = read(data, made[0].shape, size=size, mean=mean, std=std, crop=crop)
    named = str(data) if isinstance(data, str | Path) else ""
    other = made[1] if len(made) > 1 else None
    return measure_networks(made[0], other, found, source=named, count=samples, seed=seed)
