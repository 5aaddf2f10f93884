"""Opening models: what they compute, weights, types, ties, names, digests, memory."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import FAMILIES
from lighten.errors import BadInput
from lighten.model import open_model
from lighten.registry import families
from model_files import TOKENS, copied, logits, reference, write_gguf


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_computes_what_transformers_computes(tiny: Any, family: str) -> None:
    model = open_model(tiny(family))
    assert (model.kind, model.family, model.notes) == ("huggingface", family, ())
    with torch.no_grad():
        expected = reference(tiny(family))(input_ids=TOKENS, use_cache=False).logits
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_computes_what_its_folder_computes(
    tiny: Any, family: str, tmp_path: Path
) -> None:
    folder = tiny(family)
    model = open_model(write_gguf(folder, tmp_path / "m.gguf"))
    assert (model.kind, model.family, model.notes) == ("gguf", family, ())
    here = open_model(folder)
    assert list(model.tensors) == list(here.tensors)
    for name, tensor in here.tensors.items():
        assert model.tensors[name].shape == tensor.shape
        torch.testing.assert_close(model.tensors[name].load(), tensor.load(), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model), logits(here), rtol=1e-4, atol=1e-4)
    assert model.layers == here.layers


def test_llama3_frequencies_survive_gguf(tiny: Any, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = tiny("llama", rope_parameters=rope, head_dim=32)
    model = open_model(write_gguf(folder, tmp_path / "m.gguf"))
    assert model.notes == ()
    torch.testing.assert_close(logits(model), logits(open_model(folder)), rtol=1e-3, atol=1e-3)


def test_quantised_gguf_is_dequantised_as_the_gguf_package_does(tiny: Any, tmp_path: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    path = write_gguf(tiny("qwen3"), tmp_path / "m.gguf", only=("_proj.weight", "embed"))
    model = open_model(path)
    stored = {t.name: t for t in GGUFReader(path).tensors}
    family = families["qwen3"]
    for name, tensor in model.tensors.items():
        there = stored[family.gguf_name(name, 2)]
        expected = torch.from_numpy(dequantize(there.data, there.tensor_type).copy())
        assert torch.equal(tensor.load(), expected.view(tensor.shape))
        assert torch.equal(tensor.rows(1, 3), tensor.load()[1:3])
        assert tensor.nbytes == there.n_bytes
    assert {t.stored for t in model.tensors.values()} == {"F32", "Q8_0"}


def test_shards_are_one_model(tiny: Any) -> None:
    whole, parts = tiny("llama"), tiny("llama", shard="60KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    a, b = open_model(whole), open_model(parts)
    assert list(a.tensors) == list(b.tensors)
    assert all(torch.equal(a.tensors[n].load(), b.tensors[n].load()) for n in a.tensors)
    assert b.nbytes == sum(p.stat().st_size for p in parts.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_type_is_kept_and_filled_as_asked(tiny: Any, dtype: torch.dtype) -> None:
    model = open_model(tiny("llama", dtype=dtype))
    assert {t.dtype for t in model.tensors.values()} == {dtype}
    layer = model.layers[1]
    assert model.weight(layer).dtype == torch.float32
    block = model.skeleton().get_submodule(model.blocks[0])
    model.fill(block, model.blocks[0], dtype=dtype)
    assert {p.dtype for p in block.parameters()} == {dtype}
    assert torch.equal(model.weight(layer), block.self_attn.q_proj.weight.float())


def test_tied_head_is_one_tensor(tiny: Any, tmp_path: Path) -> None:
    tied = open_model(tiny("qwen2"))
    assert "lm_head.weight" not in tied.tensors
    assert tied.layers[0].kind == "embedding+head"
    apart = open_model(tiny("llama"))
    assert [layer.kind for layer in apart.layers if layer.block is None] == ["embedding", "head"]
    skeleton = tied.skeleton()
    tied.fill(skeleton)
    assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight
    numbers = {p.data_ptr(): p.numel() for p in skeleton.parameters()}
    assert tied.parameters == sum(numbers.values())
    # a file that holds the same numbers under both names, or only under the head's name
    folder = copied(tiny("qwen2"), tmp_path / "both")
    weights = load_file(folder / "model.safetensors")
    both = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(both, folder / "model.safetensors")
    assert torch.equal(logits(open_model(folder)), logits(tied))
    del both["model.embed_tokens.weight"]
    save_file(both, folder / "model.safetensors")
    assert list(open_model(folder).tensors) == list(tied.tensors)
    assert torch.equal(logits(open_model(folder)), logits(tied))


def test_a_tie_that_the_file_breaks_is_no_tie(tiny: Any, tmp_path: Path) -> None:
    folder = copied(tiny("qwen2"), tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 2
    save_file(weights, folder / "model.safetensors")
    model = open_model(folder)
    assert "differ" in model.notes[0]
    assert [layer.kind for layer in model.layers if layer.block is None] == ["embedding", "head"]
    assert model.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(model), logits(open_model(tiny("qwen2"))) * 2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_base_model_prefix_may_be_missing(tiny: Any, family: str, tmp_path: Path) -> None:
    folder = copied(tiny(family), tmp_path / "m")
    prefix = "transformer." if family == "gpt2" else "model."
    weights = load_file(folder / "model.safetensors")
    bare = {k.removeprefix(prefix): v for k, v in weights.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # the mask that old GPT-2 files carry
    save_file(bare, folder / "model.safetensors")
    model = open_model(folder)
    assert "1 tensors" in model.notes[0]
    assert "h.0.attn.bias" in model.notes[0]
    assert torch.equal(logits(model), logits(open_model(tiny(family))))


def test_digest_sees_every_part_and_no_place(tiny: Any, tmp_path: Path) -> None:
    folder = copied(tiny("llama"), tmp_path / "m")
    first = open_model(folder).digest
    assert first == open_model(tiny("llama")).digest
    assert len(first) == 64
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors")
    second = open_model(folder).digest
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (folder / "config.json").write_text(json.dumps(config))
    assert len({first, second, open_model(folder).digest}) == 3


def test_digest_of_gguf(tiny: Any, tmp_path: Path) -> None:
    a = open_model(write_gguf(tiny("llama"), tmp_path / "a.gguf"))
    b = open_model(write_gguf(tiny("llama"), tmp_path / "b.gguf"))
    c = open_model(write_gguf(tiny("llama", seed=1), tmp_path / "c.gguf"))
    assert a.digest == b.digest != c.digest
    assert a.nbytes == (tmp_path / "a.gguf").stat().st_size


def test_the_tokenizer_comes_along(tiny: Any, tmp_path: Path) -> None:
    tokenizer = open_model(tiny("llama")).tokenizer
    assert tokenizer.decode(tokenizer("pears and plums").input_ids) == "pears and plums"
    bare = copied(tiny("llama"), tmp_path / "m")
    for file in (*bare.glob("tokenizer*"), *bare.glob("*.jinja")):
        file.unlink()
    with pytest.raises(BadInput, match="tokenizer"):
        _ = open_model(bare).tokenizer


def test_hub_ids_come_from_the_cache_and_offline_is_said(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="out of reach") as caught:
        open_model("someone/nothing")
    assert "hf download someone/nothing" in caught.value.hint
    place, commit = tmp_path / "models--someone--tiny", "0" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    shutil.copytree(tiny("llama"), place / "snapshots" / commit)
    assert torch.equal(logits(open_model("someone/tiny")), logits(open_model(tiny("llama"))))


def test_memory_of_a_walk_is_one_tensor(tmp_path: Path) -> None:
    """A walk through 240 MB of tensors holds no more than a few of 6 MB at a time."""
    psutil = pytest.importorskip("psutil", reason="psutil measures memory")
    from lighten.tensors import safetensors_file

    save_file({f"t{i}": torch.ones(1500, 1000) for i in range(40)}, tmp_path / "m.safetensors")
    tensors = safetensors_file(tmp_path / "m.safetensors")
    tensors["t0"].load()
    process = psutil.Process()
    before = most = process.memory_info().rss
    for tensor in tensors.values():
        assert bool((tensor.load() == 1).all())
        most = max(most, process.memory_info().rss)
    assert most - before < 60e6
