"""Models that are damaged, foreign, or lie about themselves are refused, with a hint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lighten.errors import BadInput, WrongUse
from lighten.model import open_model
from model_files import copied, write_gguf


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
