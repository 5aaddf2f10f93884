"""Fixtures that every test may use: tiny random models of each family, made offline."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

# how long an example takes says how busy the machine is, not whether the code is right
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2")

_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "num_hidden_layers": 3,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt2": {},
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_TEXT = (
    "The river bends twice before it reaches the mill. Where does it go then?\n"
    "def area(width, height):\n    return width * height\n"
    "Nine pears, 42 plums and a basket of figs: 17.50 in all. 你好，世界。\n"
) * 4
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums over threads are not the same bits for another number of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def undocumented(repo_root: Path) -> Callable[[Path], set[str]]:
    """Run -> names of its files and folders that docs/concepts/run-directory.md does not say."""
    page = (repo_root / "docs/concepts/run-directory.md").read_text(encoding="utf-8")

    def missing(run: Path) -> set[str]:
        names = {p.name + ("/" if p.is_dir() else "") for p in run.iterdir()}
        return {name for name in names if f"`{name}" not in page}

    return missing


@pytest.fixture(scope="session")
def shared(repo_root: Path) -> Path:
    """The folder of data beside the repository; tests that need it are skipped without it."""
    folder = repo_root.parent / "shared"
    if not folder.is_dir():
        pytest.skip("../shared is not here")
    return folder


def make_tokenizer(kind: str = "bytes", vocab_size: int = 320) -> Any:
    """A trained tokenizer: "bytes" (GPT-2's kind) or "pieces" (sentencepiece's, byte fallback)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "bytes":
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        )
        raw.train_from_iterator([_TEXT], trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=raw,
            bos_token=special[0],
            eos_token=special[2],
            pad_token=special[0],
            chat_template=CHAT,
            model_max_length=10**9,
        )
    special = ["<unk>", "<s>", "</s>"]
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size, 384), special_tokens=special + fallback, show_progress=False
    )
    raw.train_from_iterator([_TEXT], trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=10**9,
    )


def make_model(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    tokenizer: str = "bytes",
    dtype: torch.dtype = torch.float32,
    shard: str = "50GB",
    **config: Any,
) -> Path:
    """Save a random model of a family, with its tokenizer, as a Hugging Face folder.

    Norms and biases are moved off 1 and 0, so that a lost one shows. shard: as save_pretrained's
    max_shard_size. config: overrides.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    words = make_tokenizer(tokenizer)
    base = _GPT2 if family == "gpt2" else _SMALL
    settings = {**base, "initializer_range": 0.15, **_OWN[family], **config}
    settings.setdefault("vocab_size", len(words))
    settings |= {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    settings.setdefault("pad_token_id", words.pad_token_id)
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 1:
                    p.add_(torch.randn_like(p) * 0.1)
    finally:
        torch.random.set_rng_state(state)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny(family, **make_model's arguments) -> folder, made once a session: only read it."""
    made: dict[str, Path] = {}

    def get(family: str = "llama", **settings: Any) -> Path:
        key = json.dumps([family, settings], sort_keys=True, default=str)
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(family), family, **settings)
        return made[key]

    return get


@pytest.fixture(scope="session")
def words() -> Callable[..., Any]:
    """words(kind) -> a new tokenizer, "bytes" or "pieces"."""
    return make_tokenizer


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """What onnxruntime takes is made up, however busy the machine is."""
    from compressed_networks import make_steady

    make_steady(monkeypatch)


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of a small network at half of its multiply-adds: leave its run as it was."""
    from compressed_networks import compress, make_steady

    with pytest.MonkeyPatch.context() as patch:
        make_steady(patch)
        return compress(tmp_path_factory.mktemp("done") / "run", budget="0.5 macs")


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp opens every export, but is not timed, nor asked."""
    from lighten.results import results  # noqa: F401  (imported before anything is replaced in it)
    from lighten.runtimes import llama_cpp

    monkeypatch.setattr(llama_cpp, "speed", lambda path, **_: llama_cpp.Speed(1.0, 2.0, 3.0, 4))
    monkeypatch.setattr(llama_cpp, "complete", lambda path, *_, **__: f"and {path.name}")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 300 lines."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"Line {i}: the quick fox sees {i * i} birds." for i in range(300)))
    return path
