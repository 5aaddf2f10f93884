"""What a model is made of: its bytes by kind of tensor, and the formats that fit each."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from lighten.model import Model, open_model
from lighten.registry import formats
from lighten.tensors import LazyTensor
from lighten.types import Layer


def inspect_model(source: str) -> dict[str, Any]:
    """Facts about a model that `summary.show` prints; reads headers, no weights. Raises BadInput.

    tensors: one row per kind (a name with its block number as `*`) and shape. fits: format -> bits
    per weight. refused: format -> why. macs_per_token: multiply-adds for one token, attention's own
    products not counted.
    """
    model = open_model(source)
    groups: dict[tuple[str, tuple[int, ...], str], list[LazyTensor]] = {}
    for name, tensor in model.tensors.items():
        groups.setdefault((_kind(name), tensor.shape, tensor.stored), []).append(tensor)
    layers = {layer.name: layer for layer in model.layers}
    types: Counter[str] = Counter()
    for tensor in model.tensors.values():
        types[tensor.stored] += tensor.nbytes
    weights = sum(tensor.numel for tensor in model.tensors.values())
    stored = sum(types.values())
    macs = sum(_macs(layer) for layer in model.layers)
    rows = [_row(kind, group, layers, stored, macs) for (kind, _, _), group in groups.items()]
    rows.sort(key=lambda row: -row["bytes"])
    return {
        "model": model.source,
        "form": model.kind,
        "architecture": getattr(model.config, "model_type", None),
        "family": model.family or "unknown: exports to huggingface forms only",
        "parameters": weights,
        "bytes": stored,
        "bits_per_weight": 8 * stored / weights if weights else None,
        "types": ", ".join(f"{kind} {size / stored:.0%}" for kind, size in types.most_common()),
        "context": _context(model),
        "blocks": len(model.blocks),
        "macs_per_token": macs,
        "tensors": rows,
        "notes": [*_refusals(rows), *model.notes],
    }


def _row(
    kind: str, group: list[LazyTensor], layers: dict[str, Layer], stored: int, macs: int
) -> dict[str, Any]:
    first = layers.get(group[0].name)
    size = sum(tensor.nbytes for tensor in group)
    row: dict[str, Any] = {
        "tensor": kind,
        "kind": first.kind if first else "other",
        "count": len(group),
        "shape": "x".join(map(str, group[0].shape)),
        "stored": group[0].stored,
        "bytes": size,
        "bytes_share": size / stored,
    }
    if first is None:
        return row | {"macs_share": 0.0, "formats": "kept"}
    refused = {name: why for name, f in formats.items() if (why := f.accepts(first.shape))}
    return row | {
        "macs_share": sum(_macs(layers[tensor.name]) for tensor in group) / (macs or 1),
        "formats": f"{len(formats) - len(refused)} of {len(formats)}",
        "fits": {
            name: formats[name].bits(first.shape[1]) for name in formats if name not in refused
        },
        "refused": refused,
    }


def _refusals(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each set of formats that some tensors cannot have."""
    said: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if refused := row.get("refused"):
            key = (short_names(list(refused)), "; ".join(sorted(set(refused.values()))[:1]))
            said.setdefault(key, []).append(row["tensor"].rpartition(".")[2])
    return [f"{', '.join(who)}: not {which} (such as: {why})" for (which, why), who in said.items()]


def short_names(names: list[str]) -> str:
    """Names of formats, those of one family together.

    >>> short_names(["q2_k", "q3_k", "iq4_xs", "int4_g128", "int4_g128_sym"])
    'int*_g128, iq4_xs, q*_k'
    """
    kinds = {re.sub(r"_sym$", "", re.sub(r"^(int|q)\d", r"\1*", name)) for name in names}
    return ", ".join(sorted(kinds))


def _kind(name: str) -> str:
    """A tensor's name with its block number as `*`, `.weight` left out."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name).removesuffix(".weight")


def _macs(layer: Layer) -> int:
    # A look-up multiplies nothing; a tied embedding multiplies once, as the head.
    return 0 if layer.kind == "embedding" else layer.size


def _context(model: Model) -> int | None:
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(value := getattr(model.config, name, None), int):
            return value
    return None
