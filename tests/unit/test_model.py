"""Opening models: weights, ties, names, layers, memory, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lighten.errors import BadInput, WrongUse
from lighten.model import Model, open_model
from lighten.registry import families

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2")
TOKENS = torch.arange(40).remainder(31).view(2, 20)


def reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Model) -> torch.Tensor:
    skeleton = model.skeleton()
    model.fill(skeleton)
    with torch.no_grad():
        return skeleton(input_ids=TOKENS, use_cache=False).logits


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def write_gguf(
    folder: Path, path: Path, only: tuple[str, ...] = (), change: dict[str, Any] | None = None
) -> Path:
    """A GGUF file of a Hugging Face folder, float32, as the families say; no tokenizer.

    only: parts of names that are stored as Q8_0. change: metadata that lie (None: left out).
    """
    import gguf
    from gguf import GGUFValueType, GGUFWriter

    model = reference(folder)
    family = families[model.config.model_type]
    writer = GGUFWriter(path, family.gguf_arch)
    for key, (value, kind) in family.metadata(model.config).items():
        value = (change or {}).get(key.partition(".")[2], value)
        if value is None:
            continue
        if isinstance(value, list):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, kind)
        else:
            writer.add_key_value(key, value, kind)
    flat = {f"{n}.weight" for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    for name, p in model.named_parameters():
        there = family.gguf_name(name, model.config.num_hidden_layers)
        w = p.detach().T.contiguous() if name in flat else p.detach()
        order = family.row_order(name, model.config)
        w = w if order is None else w[order]
        data = (w + family.offset(name)).numpy()
        if any(part in name for part in only):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(there, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(there, data)
    for name, tensor in family.extra_tensors(model.config).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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


def test_layers_of_llama(tiny: Any) -> None:
    model = open_model(tiny("llama"))
    assert model.blocks == ("model.layers.0", "model.layers.1")
    named = {layer.name: layer for layer in model.layers}
    assert len(named) == 2 + 2 * 7
    assert sum(layer.size for layer in model.layers) + 5 * 64 == model.parameters
    gate = named["model.layers.1.mlp.gate_proj.weight"]
    assert (gate.kind, gate.shape, gate.block, gate.transposed) == ("linear", (96, 64), 1, False)
    groups: dict[str, set[str]] = {}
    for layer in model.layers:
        groups.setdefault(layer.shares, set()).add(layer.name.split(".")[-2])
    assert sorted(map(sorted, groups.values())) == sorted(
        [["embed_tokens"], ["lm_head"]]
        + [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2
    )
    assert model.others == ()


def test_layers_of_gpt2_are_seen_as_out_by_in(tiny: Any) -> None:
    model = open_model(tiny("gpt2"))
    named = {layer.name: layer for layer in model.layers}
    attention = named["transformer.h.0.attn.c_attn.weight"]
    assert (attention.shape, attention.transposed) == ((192, 64), True)
    stored = model.tensors[attention.name].load()
    assert stored.shape == (64, 192)
    assert torch.equal(model.weight(attention), stored.T)
    assert named["transformer.wpe.weight"].kind == "positions"
    assert named["transformer.wte.weight"].kind == "embedding+head"


def test_unknown_architectures_are_opened_without_a_family(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, PhiConfig

    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=1,
        bos_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = open_model(tmp_path)
    assert model.family is None
    with torch.no_grad():
        expected = reference(tmp_path)(input_ids=TOKENS, use_cache=False).logits
    assert torch.equal(logits(model), expected)
    shares = {layer.name.split(".")[-2]: layer.shares for layer in model.layers if layer.block == 0}
    assert len({shares[n] for n in ("q_proj", "k_proj", "v_proj", "fc1")}) == 1  # parallel block
    assert len(set(shares.values())) == 3


def test_stacked_experts_are_reported_not_compressed(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = open_model(tmp_path)
    assert {name.split(".")[-1] for name in model.others} == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_filled_and_emptied_one_at_a_time(tiny: Any, family: str) -> None:
    model = open_model(tiny(family))
    skeleton = model.skeleton()
    model.fill(skeleton, skip=model.blocks)
    inside = tuple(f"{b}." for b in model.blocks)
    everything = dict(skeleton.named_parameters()) | dict(skeleton.named_buffers())
    assert {n for n, t in everything.items() if t.is_meta} == {
        n for n in everything if n.startswith(inside)
    }
    for prefix in model.blocks:
        block = skeleton.get_submodule(prefix)
        model.fill(block, prefix)
        assert not any(t.is_meta for t in [*block.parameters(), *block.buffers()])
    with torch.no_grad():
        got = skeleton(input_ids=TOKENS, use_cache=False).logits
    assert torch.equal(got, logits(model))
    model.empty(skeleton)
    everything = dict(skeleton.named_parameters()) | dict(skeleton.named_buffers())
    assert all(t.is_meta for t in everything.values())
    model.fill(skeleton)
    with torch.no_grad():
        assert torch.equal(skeleton(input_ids=TOKENS, use_cache=False).logits, got)


def test_filling_draws_no_random_numbers(tiny: Any) -> None:
    model = open_model(tiny("gemma3_text"))
    before = torch.random.get_rng_state()
    model.fill(model.skeleton())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_overrides_are_out_by_in(tiny: Any) -> None:
    model = open_model(tiny("gpt2"))
    layer = next(layer for layer in model.layers if layer.transposed)
    new = torch.randn(layer.shape)
    skeleton = model.skeleton()
    model.fill(skeleton, overrides={layer.name: new, "transformer.wte.weight": torch.ones(320, 64)})
    assert torch.equal(skeleton.get_parameter(layer.name), new.T)
    assert bool((skeleton.lm_head.weight == 1).all())
    new.zero_()
    assert bool(skeleton.get_parameter(layer.name).any())  # a copy, not the caller's memory
    with pytest.raises(WrongUse, match="override"):
        model.fill(skeleton, overrides={layer.name: new.T})


def test_nan_weights_are_refused_by_name(tiny: Any, tmp_path: Path) -> None:
    folder = copied(tiny("llama"), tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    for value in (float("nan"), float("inf"), -float("inf")):
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(weights, folder / "model.safetensors")
        model = open_model(folder)
        bad = next(layer for layer in model.layers if layer.name.endswith("1.mlp.up_proj.weight"))
        with pytest.raises(BadInput, match=r"layers\.1\.mlp\.up_proj\.weight.* 1 values"):
            model.weight(bad)
        with pytest.raises(BadInput, match="NaN or infinite"):
            model.fill(model.skeleton())
        model.weight(model.layers[0])


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


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("lose", "lacks 1 of"),
        ("reshape", "config makes it"),
        ("config", "config.json is damaged"),
        ("type", "model_type"),
        ("pickle", "pickle"),
        ("none", "no model.safetensors"),
        ("quantized", "already compressed"),
        ("no config", "no config.json"),
        ("deep", "num_hidden_layers = 1000000000"),
    ],
)
def test_damaged_folders_are_refused(tiny: Any, tmp_path: Path, damage: str, said: str) -> None:
    folder = copied(tiny("llama"), tmp_path / "m")
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors, settings = load_file(weights), json.loads(config.read_text())
    if damage == "lose":
        del tensors["model.norm.weight"]
        save_file(tensors, weights)
    elif damage == "reshape":
        tensors["model.norm.weight"] = torch.ones(63)
        save_file(tensors, weights)
    elif damage == "config":
        config.write_bytes(b"{\xff")
    elif damage == "type":
        config.write_text(json.dumps({**settings, "model_type": "no-such-model"}))
    elif damage == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif damage == "none":
        weights.unlink()
    elif damage == "quantized":
        config.write_text(json.dumps({**settings, "quantization_config": {"quant_method": "x"}}))
    elif damage == "deep":
        config.write_text(json.dumps({**settings, "num_hidden_layers": 10**9}))
    else:
        config.unlink()
    with pytest.raises(BadInput, match=said) as caught:
        open_model(folder)
    assert caught.value.hint


LIES: list[dict[str, Any]] = [
    {"block_count": 4},
    {"block_count": 2**31},
    {"block_count": None},
    {"embedding_length": 128},
    {"embedding_length": 2**31},
    {"feed_forward_length": 97},
    {"context_length": None},
    {"attention.head_count": 5},
    {"attention.head_count": 2**30},
    {"attention.head_count_kv": 0},
    {"attention.key_length": 17},
    {"attention.key_length": 2**30, "attention.value_length": 2**30},
    {"attention.value_length": 4},
    {"attention.layer_norm_rms_epsilon": float("nan")},
]


@pytest.mark.parametrize("lie", LIES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_metadata_that_lie_are_refused(
    tiny: Any, tmp_path: Path, family: str, lie: dict[str, Any]
) -> None:
    path = write_gguf(tiny(family), tmp_path / "m.gguf", change=lie)
    with pytest.raises(BadInput) as caught:
        open_model(path)
    assert caught.value.hint


def test_foreign_and_split_gguf_are_refused(tmp_path: Path) -> None:
    import gguf

    for arch, splits, said in (("whisper", 1, "whisper"), ("llama", 2, "one part")):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", arch)
        writer.add_uint16("split.count", splits)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(BadInput, match=said):
            open_model(tmp_path / "m.gguf")


def test_what_is_no_model_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="there is no model"):
        open_model(tmp_path / "nowhere")
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(WrongUse, match=r"no \.gguf"):
        open_model(tmp_path / "a.safetensors")


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
