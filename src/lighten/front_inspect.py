"""The public verb for looking at a model that nothing was done to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lighten import inspect_page
from lighten.front import is_network, opened
from lighten.inspect import inspect_model
from lighten.inspect_network import inspect_network


def inspect(
    model: Any, example_inputs: Any = None, *, weights: str | Path | None = None,
    size: int | None = None, html: str | Path | None = None, data: Any = None, mean: Any = None,
    std: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """What a language model or a network is made of, and what of it can shrink.

    html: where its page goes, see lighten.inspect_page. data, mean, std: what that previews
    sensitivities of a network on.
    """
    if html or data is not None or mean or std:
        return inspect_page.write(html, model, example_inputs, weights=weights, size=size,
                                  data=data, mean=mean, std=std)  # fmt: skip
    if is_network(model):
        return inspect_network(opened(model, example_inputs, weights, size))
    return inspect_model(model)
