"""`measure_model` on whole files: folders and GGUF, alone and against each other."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lighten.cli import main
from lighten.data import load_text, windows
from lighten.errors import WrongUse
from lighten.measure import measure_model
from lighten.model import open_model
from lighten.registry import exporters, formats
from lighten.types import Compressed, Layer, Spec

Tiny = Callable[..., Path]
SMALL = {"samples": 4, "length": 48}


def logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """The whole network by transformers, (windows, length, vocabulary)."""
    model = open_model(path)
    module = model.skeleton()
    model.fill(module)
    with torch.no_grad():
        found: torch.Tensor = module(ids).logits.double()
    return found


def coarse(path: Path, out: Path) -> Path:
    """The model as GGUF, every matrix that can be Q4_0."""
    model = open_model(path)

    def encode(layer: Layer) -> Compressed:
        format = formats["q4_0"]
        w = model.weight(layer)
        grid = format.fit(w)
        return Compressed(
            Spec("q4_0"), layer.shape, format, format.pack(format.encode(w, grid), grid)
        )

    fits = [x for x in model.layers if x.kind == "linear" and not formats["q4_0"].accepts(x.shape)]
    assert fits
    exporters["gguf"].write(model, {x.name: encode(x) for x in fits}, out)
    return out


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_compressed_gguf_against_its_folder_equals_whole_logits(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    settings = {"final_logit_softcapping": 2.0} if family == "gemma3_text" else {}
    folder = tiny(family, **settings)
    small = coarse(folder, tmp_path / "small.gguf")
    facts = measure_model(small, against=folder, runtime=False, **SMALL)
    ids = windows(load_text(), open_model(folder).tokenizer, 48, 4)
    p = logits(folder, ids)[:, :-1].log_softmax(-1)
    q = logits(small, ids)[:, :-1].log_softmax(-1)
    kld = (p.exp() * (p - q)).sum(-1).numpy()
    nll = -q.gather(2, ids[:, 1:, None]).numpy()
    found = facts["measured"]
    assert found["mean_kld"]["value"] == pytest.approx(kld.mean(), rel=1e-3)
    assert found["p99_kld"]["value"] == pytest.approx(np.quantile(kld, 0.99), rel=1e-3)
    assert found["perplexity"]["value"] == pytest.approx(np.exp(nll.mean()), rel=1e-4)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert found["top1_agreement"]["value"] == pytest.approx(float(agreement))
    assert found["mean_kld"]["low"] > 1e-4
    assert found["bytes"] == small.stat().st_size < facts["reference"]["bytes"]
    assert found["bits_per_weight"] == 8 * found["bytes"] / open_model(folder).parameters
    assert (facts["windows"], facts["tokens"]) == (4, 4 * 47)


def test_a_model_against_itself_is_itself(tiny: Tiny) -> None:
    folder = tiny("qwen3")
    found = measure_model(folder, against=folder, **SMALL)
    assert found["measured"]["mean_kld"] == {"value": 0, "low": 0, "high": 0}
    assert found["measured"]["top1_agreement"] == {"value": 1, "low": 1, "high": 1}
    assert found["measured"]["perplexity"] == found["reference"]["perplexity"]


def test_a_model_alone(tiny: Tiny) -> None:
    found = measure_model(tiny("llama"), **SMALL)
    assert set(found["measured"]) == {"bytes", "bits_per_weight", "perplexity"}
    assert "reference" not in found
    assert any("--data" in line for line in found["notes"])


def test_second_half_only_scores_fewer_tokens(tiny: Tiny) -> None:
    found = measure_model(tiny("llama"), second_half_only=True, **SMALL)
    assert found["tokens"] == 4 * 23


def test_models_that_split_text_differently_are_refused(tiny: Tiny) -> None:
    with pytest.raises(WrongUse, match="does not split text into the tokens"):
        measure_model(tiny("llama"), against=tiny("llama", tokenizer="pieces"), **SMALL)


def test_windows_longer_than_the_model_are_refused(tiny: Tiny) -> None:
    with pytest.raises(WrongUse, match="takes no more than 128") as raised:
        measure_model(tiny("llama"), samples=2, length=200)
    assert raised.value.hint == "give --length 128 or less"


def test_the_command_prints_the_facts(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny("llama"))
    data = tmp_path / "text.txt"
    data.write_text("The mill stands where the river bends twice. " * 60)
    line = ["measure", folder, "--against", folder, "--data", str(data), "--samples", "3"]
    assert main([*line, "--length", "32", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["measured"]["mean_kld"]["value"] == 0
    assert facts["data"] == str(data)
    assert facts["notes"] == []
    assert main([*line, "--length", "32"]) == 0
    shown = capsys.readouterr().out
    assert "top1 agreement" in shown
    assert "100.0 %" in shown


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp")
def test_a_gguf_is_timed_in_llama_cpp(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lighten.runtimes import llama_cpp

    timed: list[Path] = []

    def quick(path: Path, **_: int) -> llama_cpp.Speed:
        timed.append(path)
        return llama_cpp.Speed(1.0, 2.0, 3.0, 4)

    monkeypatch.setattr(llama_cpp, "speed", quick)
    path = coarse(tiny("llama"), tmp_path / "small.gguf")
    found = measure_model(path, against=tiny("llama"), **SMALL)
    assert timed == [path]
    assert found["measured"]["generate_tokens_per_second"] == 3.0
    assert found["measured"]["peak_memory_bytes"] == 4
    assert "load_seconds" not in found["reference"]
