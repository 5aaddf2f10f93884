"""What holds for every exporter on every family: sizes, read-back, equal bytes, all or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lighten.errors import BadOutput, UserError
from lighten.model import Model, open_model
from lighten.registry import exporters, families, formats
from lighten.types import Compressed, Layer, Spec
from lighten.verify import verify

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2")
NAMES = tuple(name for name in exporters if exporters[name].holds == "language models")
PREFERRED = ("q4_0", "q8_0", "q5_1", "int4_g32_sym", "int8_channel_sym", "int3_g32_sym")

Tiny = Callable[..., Path]


def encode(model: Model, layer: Layer, format: str) -> Compressed:
    entry, w = formats[format], model.weight(layer)
    grid = entry.fit(w)
    parts = entry.pack(entry.encode(w, grid), grid)
    return Compressed(Spec(format=format), layer.shape, entry, parts)


def mixture(exporter: Any, model: Model) -> dict[str, Compressed]:
    """Each layer in another format that the exporter takes, every fourth left as it is."""
    weights = {}
    for i, layer in enumerate(model.layers):
        order = PREFERRED[i % len(PREFERRED) :] + PREFERRED
        fits = [
            f
            for f in order
            if exporter.accepts(Spec(format=f), layer, model) is None
            and formats[f].accepts(layer.shape) is None
        ]
        if i % 4 and fits:
            weights[layer.name] = encode(model, layer, fits[0])
    return weights


def specs(weights: Mapping[str, Compressed]) -> dict[str, Spec]:
    return {name: weight.spec for name, weight in weights.items()}


def on_disk(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


def place(exporter: Any, folder: Path, name: str) -> Path:
    return folder / f"{name}{exporter.suffix}"


def opened(tiny: Tiny, name: str, family: str, **settings: Any) -> tuple[Any, Model]:
    exporter, model = exporters[name], open_model(tiny(family, **settings))
    if exporter.refuses(model) is not None:
        pytest.skip(f"{name} refuses {family}: {exporter.refuses(model)}")
    return exporter, model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_reads_back_and_has_the_announced_size(
    tiny: Tiny, tmp_path: Path, name: str, family: str
) -> None:
    exporter, model = opened(tiny, name, family, tokenizer="pieces", dtype=torch.bfloat16)
    weights = mixture(exporter, model)
    assert weights
    out = place(exporter, tmp_path, "out")
    exporter.write(model, weights, out)
    verify(exporter, model, weights, out)
    assert exporter.nbytes(model, specs(weights)) == on_disk(out)
    assert set(exporter.read(out, model)) == set(model.tensors)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_compressed_is_carried_over(
    tiny: Tiny, tmp_path: Path, name: str, family: str
) -> None:
    exporter, model = opened(tiny, name, family)
    out = place(exporter, tmp_path, "out")
    exporter.write(model, {}, out)
    verify(exporter, model, {}, out)
    assert exporter.nbytes(model, {}) == on_disk(out)


@pytest.mark.parametrize("name", NAMES)
def test_layer_bytes_add_up(tiny: Tiny, name: str) -> None:
    exporter, model = opened(tiny, name, "llama")
    weights = mixture(exporter, model)
    for chosen in ({}, specs(weights)):
        parts = [
            exporter.layer_bytes(model, la, chosen.get(la.name, Spec())) for la in model.layers
        ]
        total, exact = exporter.fixed_bytes(model) + sum(parts), exporter.nbytes(model, chosen)
        slack = 0 if name != "compressed_tensors" else 12_000 + 512 * len(chosen)
        assert exact <= total <= exact + slack


@pytest.mark.parametrize("name", NAMES)
def test_two_writes_are_equal_and_one_replaces_the_other(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    exporter, model = opened(tiny, name, "llama")
    weights = mixture(exporter, model)
    a, b = (place(exporter, tmp_path, letter) for letter in "ab")
    exporter.write(model, {}, a)
    exporter.write(model, weights, a)
    exporter.write(model, weights, b)
    assert content(a) == content(b)
    assert sorted(tmp_path.iterdir()) == [a, b]


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_write_leaves_what_was_there(tiny: Tiny, tmp_path: Path, name: str) -> None:
    exporter, model = opened(tiny, name, "llama")
    weights = mixture(exporter, model)
    out = place(exporter, tmp_path, "out")
    exporter.write(model, {}, out)
    before = content(out)
    last = list(weights)[-1]
    short = {key: part[:-1] for key, part in weights[last].parts.items()}
    broken = weights | {last: replace(weights[last], parts=short)}
    with pytest.raises((UserError, RuntimeError)):
        exporter.write(model, broken, out)
    assert content(out) == before
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("name", NAMES)
def test_other_peoples_places_are_refused(tiny: Tiny, tmp_path: Path, name: str) -> None:
    exporter, model = opened(tiny, name, "llama")
    folder = place(exporter, tmp_path, "home")
    folder.mkdir()
    (folder / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError):
        exporter.write(model, {}, folder)
    assert content(folder) == {"diary.txt": b"dear diary"}
    with pytest.raises(UserError):
        exporter.write(model, {}, place(exporter, folder / "diary.txt", "out"))
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs rights that can be missing")
@pytest.mark.parametrize("name", NAMES)
def test_unwritable_place_is_a_user_error(tiny: Tiny, tmp_path: Path, name: str) -> None:
    exporter, model = opened(tiny, name, "llama")
    tmp_path.chmod(0o500)
    with pytest.raises(UserError):
        exporter.write(model, {}, place(exporter, tmp_path, "out"))


@pytest.mark.parametrize("name", NAMES)
def test_verify_names_the_tensor_that_differs(tiny: Tiny, tmp_path: Path, name: str) -> None:
    exporter, model = opened(tiny, name, "llama")
    weights = mixture(exporter, model)
    exporter.write(model, weights, place(exporter, tmp_path, "out"))
    victim = next(iter(weights))
    kept = next(layer for layer in model.layers if layer.name not in weights)
    other = weights[victim].rows(torch.arange(weights[victim].shape[0]).flip(0))
    with pytest.raises(BadOutput, match=victim):
        verify(exporter, model, weights | {victim: other}, place(exporter, tmp_path, "out"))
    zeros = Compressed(
        Spec(format="f32"),
        kept.shape,
        formats["f32"],
        formats["f32"].pack(torch.zeros(kept.shape), {}),
    )
    with pytest.raises(BadOutput, match=kept.name):
        verify(exporter, model, weights | {kept.name: zeros}, place(exporter, tmp_path, "out"))


@pytest.mark.parametrize("name", NAMES)
def test_a_spec_is_taken_or_refused_with_a_reason(tiny: Tiny, name: str) -> None:
    exporter, model = opened(tiny, name, "llama")
    for layer in model.layers:
        assert exporter.accepts(Spec(), layer, model) is None
        for format in formats:
            why = exporter.accepts(Spec(format=format), layer, model)
            assert why is None or len(why) > 10
            if why is None and formats[format].accepts(layer.shape) is None:
                assert exporter.layer_bytes(model, layer, Spec(format=format)) > 0


def test_compressed_weights_are_smaller(tiny: Tiny) -> None:
    model = open_model(tiny("llama"))
    layer = next(la for la in model.layers if la.kind == "linear")
    for name, format in (("gguf", "q4_0"), ("compressed_tensors", "int4_channel_sym")):
        exporter = exporters[name]
        small = exporter.layer_bytes(model, layer, Spec(format=format))
        assert small < exporter.layer_bytes(model, layer, Spec())


@pytest.mark.parametrize("name", ["huggingface", "compressed_tensors"])
def test_shards_and_their_index(tiny: Tiny, tmp_path: Path, name: str) -> None:
    exporter, model = opened(tiny, name, "llama")
    exporter = replace(exporter, shard_bytes=60_000)
    weights = mixture(exporter, model)
    exporter.write(model, weights, place(exporter, tmp_path, "out"))
    verify(exporter, model, weights, place(exporter, tmp_path, "out"))
    assert len(list((place(exporter, tmp_path, "out")).glob("model-*-of-*.safetensors"))) > 2
    exact = exporter.nbytes(model, specs(weights))
    assert exact == on_disk(place(exporter, tmp_path, "out"))
    chosen = specs(weights)
    parts = [exporter.layer_bytes(model, la, chosen.get(la.name, Spec())) for la in model.layers]
    assert exporter.fixed_bytes(model) + sum(parts) >= exact


def test_unknown_family_is_refused_by_gguf_only(tiny: Tiny, tmp_path: Path) -> None:
    model = replace(open_model(tiny("llama")), family=None)
    assert "llama" in str(exporters["gguf"].refuses(model))
    with pytest.raises(UserError, match="cannot be written as GGUF"):
        exporters["gguf"].write(model, {}, tmp_path / "x.gguf")
    exporters["huggingface"].write(model, {}, tmp_path / "folder")
    assert "llama" in families


@pytest.mark.parametrize("name", NAMES)
def test_from_gguf_to_everything(tiny: Tiny, tmp_path: Path, name: str) -> None:
    source = open_model(tiny("llama"))
    first = exporters["gguf"]
    first.write(source, mixture(first, source), tmp_path / "first.gguf")
    model = open_model(tmp_path / "first.gguf")
    exporter = exporters[name]
    weights = mixture(exporter, model)
    exporter.write(model, weights, place(exporter, tmp_path, "out"))
    verify(exporter, model, weights, place(exporter, tmp_path, "out"))
    assert exporter.nbytes(model, specs(weights)) == on_disk(place(exporter, tmp_path, "out"))
    if name == "gguf":
        chosen = specs(weights)
        parts = [
            exporter.layer_bytes(model, la, chosen.get(la.name, Spec())) for la in model.layers
        ]
        assert exporter.fixed_bytes(model) + sum(parts) == on_disk(place(exporter, tmp_path, "out"))
        exporter.write(model, {}, tmp_path / "same.gguf")
        assert (tmp_path / "same.gguf").read_bytes() == (tmp_path / "first.gguf").read_bytes()
