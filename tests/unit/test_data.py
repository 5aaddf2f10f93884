"""Text -> windows: kinds of files, order, separators, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lighten import data
from lighten.data import load_text, windows
from lighten.errors import BadInput, WrongUse


@pytest.fixture(scope="module")
def tokenizer(words: Any) -> Any:
    return words("bytes")


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def written(path: Path, *entries: Any) -> Path:
    path.write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
    return path


def test_the_shipped_text_is_varied_and_stable(tokenizer: Any) -> None:
    corpus = load_text()
    assert corpus.builtin
    assert corpus.source == "built-in text"
    assert 25_000 < corpus.nbytes < 60_000
    assert corpus.digest == load_text().digest
    text = "".join(document.text() for document in corpus.documents)
    for part in ("The ferry at Hollin", "def sieve", "茶馆", "| Element", "User: What is 17%"):
        assert part in text
    assert windows(corpus, tokenizer, 128, 16).shape == (16, 128)


def test_windows_are_consecutive_from_the_start(tmp_path: Path, tokenizer: Any) -> None:
    text = "one two three four five six seven\n" * 50
    (tmp_path / "a.txt").write_text(text)
    corpus = load_text(tmp_path / "a.txt")
    assert not corpus.builtin
    assert corpus.nbytes == len(text)
    got = windows(corpus, tokenizer, 16, 8)
    assert got.dtype == torch.int64
    assert got.flatten().tolist() == ids(tokenizer, text)[: 16 * 8]


def test_fewer_windows_come_with_a_note(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("a b c d e f g h i j " * 10)
    corpus = load_text(tmp_path / "a.txt")
    total = len(ids(tokenizer, "a b c d e f g h i j " * 10))
    got = windows(corpus, tokenizer, 32, 1000)
    assert got.shape == (total // 32, 32)
    assert f"has {total} tokens: {total // 32} windows of 32, not 1000" in capsys.readouterr().err
    with pytest.raises(BadInput, match=f"{total} tokens, less than one window"):
        windows(corpus, tokenizer, total + 1, 1)
    assert windows(corpus, tokenizer, total, 1).shape == (1, total)
    with pytest.raises(WrongUse, match="at least 1"):
        windows(corpus, tokenizer, 0, 4)


def test_jsonl_fields(tmp_path: Path, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day"}]
    path = written(
        tmp_path / "a.jsonl",
        {"text": "plain 你好", "id": 3},
        {"content": "content"},
        {"messages": chat},
        {"prompt": "2+2=", "completion": "4"},
    )
    with path.open("a") as file:
        file.write("\n   \n" + json.dumps({"text": "no newline at the end"}))
    corpus = load_text(path)
    assert len(corpus.documents) == 5
    assert [d.text() for d in corpus.documents] == [
        "plain 你好",
        "content",
        "Hi\n\nGood day",
        "2+2=4",
        "no newline at the end",
    ]
    asked = corpus.documents[2].text(tokenizer)
    assert asked == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nGood day<|im_end|>\n"
    assert corpus.documents[-1].text() == "no newline at the end"
    assert [d.text() for d in corpus.documents[:2]] == ["plain 你好", "content"]
    with pytest.raises(IndexError):
        _ = corpus.documents[5]


def test_documents_are_joined_by_bos_or_an_empty_line(
    tmp_path: Path, tokenizer: Any, words: Any
) -> None:
    path = written(tmp_path / "a.jsonl", {"text": "pears pears"}, {"text": "plums plums"})
    corpus = load_text(path)
    expected = (
        ids(tokenizer, "pears pears") + ids(tokenizer, "\n\n") + ids(tokenizer, "plums plums")
    )
    assert windows(corpus, tokenizer, len(expected), 1)[0].tolist() == expected
    bos = words("pieces")
    expected = [bos.bos_token_id, *ids(bos, "pears pears"), bos.bos_token_id]
    expected += ids(bos, "plums plums")
    assert windows(corpus, bos, len(expected), 1)[0].tolist() == expected


def test_a_bos_that_is_there_is_not_doubled(tmp_path: Path, words: Any) -> None:
    bos = words("pieces")
    bos.chat_template = "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    path = written(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "figs " * 20}]})
    got = windows(load_text(path), bos, 12, 1)[0].tolist()
    assert got[0] == bos.bos_token_id
    assert got.count(bos.bos_token_id) == 1


def test_a_seed_shuffles_documents_only(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path / "a.jsonl", *({"text": f"{i:02d}"} for i in range(40)))
    corpus = load_text(path)
    plain = windows(corpus, tokenizer, 4, 10)
    assert torch.equal(plain, windows(corpus, tokenizer, 4, 10, seed=0))
    once, again = (windows(corpus, tokenizer, 4, 10, seed=7) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, plain)


def test_folders_are_sorted_and_recursive(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in {"c.txt": "third", "b/x.txt": "second", "a.txt": "first"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / ".git" / "no.txt").write_text("hidden")
    (tmp_path / "no.bin").write_bytes(b"\0\1")
    corpus = load_text(tmp_path)
    assert [d.text() for d in corpus.documents] == ["first", "second", "third"]
    before = corpus.digest
    (tmp_path / "c.txt").write_text("Third")
    assert load_text(tmp_path).digest != before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no text"),
        (b" \n\t\n", "no text"),
        (b"abc\0def", "binary: a zero at byte 3"),
        (b"caf\xe9 au lait", "not UTF-8"),
        (b"cut off \xe4\xbd", "not UTF-8"),
        ("gegrüßt".encode("utf-16"), "binary"),
    ],
)
def test_bad_text_files(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(BadInput, match=said) as caught:
        load_text(tmp_path / "a.txt")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "cut o', "line 3 is not JSON"),
        (b"[1, 2]", "line 3: a list"),
        (b'{"title": "x"}', "line 3: no text among its fields"),
        (b'{"text": 5}', "line 3: no text"),
        (b'{"messages": [{"role": "user"}]}', "line 3: a message"),
        (b'{"messages": ["hello"]}', "line 3: a message"),
        (b'{"text": "caf\xe9"}', "line 3 is not UTF-8"),
        (b'{"text": "\\ud800"}', "line 3 is not UTF-8"),
        (b"[" * 100_000, "line 3"),
        (b"\0\0\0", "line 3 is not"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, said: str) -> None:
    good = b'{"text": "fine"}\n'
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + line + b"\n" + good)
    with pytest.raises(BadInput, match=said):
        load_text(tmp_path / "a.jsonl")


def test_what_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="no data at"):
        load_text(tmp_path / "nowhere.txt")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadInput, match=r"neither \.txt nor \.jsonl"):
        load_text(tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"has no \.txt"):
        load_text(tmp_path)
    written(tmp_path / "empty.jsonl", {"text": ""}, {"text": "  "})
    with pytest.raises(BadInput, match="no text"):
        load_text(tmp_path / "empty.jsonl")


def test_a_chat_that_the_template_refuses(tmp_path: Path, words: Any) -> None:
    tokenizer = words("bytes")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = written(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(BadInput, match="roles must alternate"):
        windows(load_text(path), tokenizer, 1, 1)


def test_huge_files_are_tokenised_in_pieces_to_the_same_ids(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The mill  stands.\n\nPears, plums: 42!\n  return width * height\n你好世界 " * 300
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    whole = ids(tokenizer, text)
    monkeypatch.setattr(data, "_PIECE", 500)
    monkeypatch.setattr(data, "_READ", 333)  # cuts characters of several bytes apart
    pieces = list(load_text(tmp_path / "a.txt").documents[0].pieces())
    assert len(pieces) > 20
    got = windows(load_text(tmp_path / "a.txt"), tokenizer, len(whole), 1)
    assert got[0].tolist() == whole


def test_reading_stops_when_there_is_enough(tmp_path: Path) -> None:
    asked = []

    def tokenizer(text: str, **_: Any) -> Any:
        asked.append(len(text))
        return type("Ids", (), {"input_ids": [1] * len(text)})

    (tmp_path / "a.txt").write_text("word " * 1_000_000)
    windows(load_text(tmp_path / "a.txt"), tokenizer, 512, 4)
    assert sum(asked) < 600_000


@given(st.text(max_size=300), st.integers(1, 40))
def test_pieces_make_the_text(text: str, size: int) -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(data, "_PIECE", size)
    pieces = list(data._split(iter([text[:7], text[7:]])))
    patch.undo()
    assert "".join(pieces) == text
    assert all(len(p) <= 2 * size for p in pieces)
    assert all(pieces)
