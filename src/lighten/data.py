"""Text to calibrate and measure on: files -> documents -> token windows.

A corpus is checked once, whole, when it is loaded (encoding, broken lines, digest); after that
its documents are read from disk as they are needed, and never all at once.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lighten.errors import BadInput, WrongUse
from lighten.progress import note

BUILTIN = "built-in text"
_SUFFIXES = (".txt", ".jsonl")
_READ = 1 << 20  # bytes
_PIECE = 1 << 18  # characters tokenised at a time
_LONGEST_LINE = 1 << 26  # bytes of one .jsonl line


@dataclass(frozen=True)
class Document:
    """One text: a whole .txt file, or one line of a .jsonl file (at byte `start`)."""

    path: Path
    start: int | None = None

    def pieces(self, tokenizer: Any = None) -> Iterator[str]:
        """The text in pieces that end where words do; chats through the tokenizer's template."""
        if self.start is None:
            yield from _split(_decoded(self.path))
            return
        with self.path.open("rb") as file:
            file.seek(self.start)
            yield from _split(iter([_line_text(json.loads(file.readline()), tokenizer)]))

    def text(self, tokenizer: Any = None) -> str:
        """The whole text."""
        return "".join(self.pieces(tokenizer))


@dataclass(frozen=True)
class Documents(Sequence[Document]):
    """The documents of some files, in order; `starts`: of each file's lines, None for a text."""

    files: tuple[Path, ...]
    starts: tuple[array[int] | None, ...] = field(repr=False)

    def __len__(self) -> int:
        return sum(1 if s is None else len(s) for s in self.starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        left = index + len(self) if index < 0 else index
        for path, starts in zip(self.files, self.starts, strict=True):
            size = 1 if starts is None else len(starts)
            if 0 <= left < size:
                return Document(path, None if starts is None else starts[left])
            left -= size
        raise IndexError(index)


@dataclass(frozen=True)
class Corpus:
    """source: as the user wrote it. digest: sha256 in hex of the files' bytes, in order.

    nbytes: their size. builtin: whether it is the text that the package ships.
    """

    source: str
    builtin: bool
    digest: str
    nbytes: int
    documents: Documents = field(repr=False)


def load_text(path: str | Path | None = None) -> Corpus:
    """A .txt or .jsonl file, a folder of them (sorted, recursive), or None: what lighten ships.

    A .jsonl line is an object with `text`, `content`, `messages` (role and content) or `prompt`
    and `completion`. Raises BadInput for what is empty, binary, not UTF-8 or a broken line (with
    its number), WrongUse for a path that does not exist.
    """
    if path is None:
        return _corpus(BUILTIN, sorted(Path(__file__).with_name("texts").glob("*.txt")), True)
    root = Path(path).expanduser()
    if root.is_dir():
        inside = sorted(p for p in root.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
        files = [p for p in inside if not any(s[0] == "." for s in p.relative_to(root).parts)]
        if not files:
            raise BadInput(f"{root} has no .txt and no .jsonl file", "give a file or its folder")
        return _corpus(str(path), files, False)
    if not root.is_file():
        raise WrongUse(f"there is no data at {path}", "give a .txt or .jsonl file or a folder")
    if root.suffix not in _SUFFIXES:
        hint = "rename plain text to .txt, or write one JSON object with `text` per line as .jsonl"
        raise BadInput(f"{path} is neither .txt nor .jsonl", hint)
    return _corpus(str(path), [root], False)


def _corpus(source: str, files: list[Path], builtin: bool) -> Corpus:
    sha, size, starts, words = hashlib.sha256(), 0, [], False
    for file in files:
        try:
            lines, some, length = (_scan_lines if file.suffix == ".jsonl" else _scan_text)(
                file, sha
            )
        except OSError as error:
            raise BadInput(f"cannot read {file}: {error.strerror}", "check the path") from error
        starts.append(lines)
        words, size = words or some, size + length
    if not words:
        raise BadInput(f"{source} has no text in it", "give a file with some thousand words")
    return Corpus(source, builtin, sha.hexdigest(), size, Documents(tuple(files), tuple(starts)))


def _scan_text(file: Path, sha: Any) -> tuple[array[int] | None, bool, int]:
    """(None, whether it holds more than blanks, bytes)."""
    words, size = False, 0
    for text, raw in _chunks(file):
        sha.update(raw)
        words, size = words or bool(text.strip()), size + len(raw)
    return None, words, size


def _scan_lines(file: Path, sha: Any) -> tuple[array[int] | None, bool, int]:
    """(starts of the lines, whether any holds more than blanks, bytes); checks every line."""
    starts, words, at, number = array("Q"), False, 0, 0
    with file.open("rb") as handle:
        while raw := handle.readline(_LONGEST_LINE):
            number += 1
            if len(raw) == _LONGEST_LINE:
                raise BadInput(
                    f"{file}, line {number}: longer than {_LONGEST_LINE} bytes", "split it"
                )
            sha.update(raw)
            if raw.strip():
                words = bool(_parsed(file, number, raw).strip()) or words
                starts.append(at)
            at += len(raw)
    return starts, words, at


def _parsed(file: Path, number: int, raw: bytes) -> str:
    """The text of one line; raises BadInput with its number."""
    where = f"{file}, line {number}"
    try:
        text = _line_text(json.loads(raw), None)
        text.encode()  # half of a surrogate pair is valid JSON, but no text
        return text
    except UnicodeError as error:
        raise BadInput(f"{where} is not UTF-8: {error}", "convert it to UTF-8") from error
    except json.JSONDecodeError as error:
        hint = "each line is one JSON object; is the file cut off?"
        raise BadInput(f"{where} is not JSON: {error.msg} at column {error.colno}", hint) from error
    except (ValueError, RecursionError) as error:
        hint = "use `text`, `content`, `messages` (role, content) or `prompt` and `completion`"
        raise BadInput(f"{where}: {error}", hint) from error


def _line_text(entry: Any, tokenizer: Any) -> str:
    """The text of one JSON object; raises ValueError."""
    if not isinstance(entry, dict):
        raise ValueError(f"a {type(entry).__name__} where an object should be")
    for key in ("text", "content"):
        if isinstance(entry.get(key), str):
            return str(entry[key])
    if isinstance(entry.get("messages"), list):
        return _chat(entry["messages"], tokenizer)
    prompt, completion = entry.get("prompt"), entry.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    raise ValueError(f"no text among its fields {sorted(map(str, entry))}")


def _chat(messages: list[Any], tokenizer: Any) -> str:
    """A conversation as the model reads it: by its template, else the messages one by one."""
    for message in messages:
        good = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not good or not isinstance(message.get("content"), str):
            raise ValueError("a message without a role and a content that are text")
    if getattr(tokenizer, "chat_template", None):
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # templates raise whatever they like, e.g. on the order of roles
            hint = "the template of this model does not accept such a conversation"
            raise BadInput(f"chat template: {error}", hint) from error
    return "\n\n".join(message["content"] for message in messages)


def _chunks(file: Path) -> Iterator[tuple[str, bytes]]:
    """(text, bytes) of a text file, piece by piece; raises BadInput where it is no UTF-8 text."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    at = 0
    with file.open("rb") as handle:
        while True:
            raw = handle.read(_READ)
            if b"\0" in raw:
                where = at + raw.index(b"\0")
                raise BadInput(f"{file} is binary: a zero at byte {where}", "give a text file")
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                near = f"{error.reason} near byte {at + error.start}"
                raise BadInput(f"{file} is not UTF-8: {near}", "convert it to UTF-8") from error
            yield text, raw
            if not raw:
                return
            at += len(raw)


def _decoded(file: Path) -> Iterator[str]:
    return (text for text, _ in _chunks(file))


def _split(parts: Iterator[str]) -> Iterator[str]:
    """The same text in pieces of about _PIECE characters, cut before a line or a word begins."""
    held = ""
    for part in parts:
        held += part
        while len(held) > 2 * _PIECE:
            cut = _cut(held)
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _cut(text: str) -> int:
    """Where to cut: tokenisers treat both sides as they would if they were together."""
    line = text.rfind("\n", 1, _PIECE)
    while line > 0:
        if not text[line + 1].isspace():
            return line + 1
        line = text.rfind("\n", 1, line)
    word = text.rfind(" ", 1, _PIECE)
    return word if word > 0 else _PIECE


def windows(corpus: Corpus, tokenizer: Any, length: int, count: int, seed: int = 0) -> Tensor:
    """(count, length) int64: consecutive windows from the start of the token stream.

    Documents follow each other, each after a BOS where the tokenizer adds one, else after an
    empty line. seed: 0 keeps their order, another shuffles them. If there is less text, fewer
    windows come back and a note says so; raises BadInput if there is not one.
    """
    if length < 1 or count < 1:
        raise WrongUse(f"{count} windows of {length} tokens", "both must be at least 1")
    need, start = length * count, _start_ids(tokenizer)
    ids: array[int] = array("q")
    order = list(range(len(corpus.documents))) if seed else range(len(corpus.documents))
    if isinstance(order, list):
        random.Random(seed).shuffle(order)
    for position, index in enumerate(order):
        for piece in _document_ids(corpus.documents[index], tokenizer, start, position == 0):
            ids.extend(piece)
            if len(ids) >= need:
                break
        if len(ids) >= need:
            break
    whole = min(len(ids) // length, count)
    if whole == 0:
        raise BadInput(
            f"{corpus.source} has {len(ids)} tokens, less than one window of {length}",
            "give more text, or ask for shorter windows",
        )
    if whole < count:
        note(f"{corpus.source} has {len(ids)} tokens: {whole} windows of {length}, not {count}")
    return torch.tensor(ids[: whole * length], dtype=torch.int64).view(whole, length)


def _document_ids(
    document: Document, tokenizer: Any, start: list[int], first: bool
) -> Iterator[list[int]]:
    """Token ids of one document, piece by piece, with what separates it from the one before."""
    for i, piece in enumerate(document.pieces(tokenizer)):
        ids = tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
        if i == 0:
            if start and ids[: len(start)] != start:  # a chat template may have put it there
                yield start
            elif not start and not first:
                yield tokenizer("\n\n", add_special_tokens=False, verbose=False).input_ids
        yield ids


def _start_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for i in range(len(full) - len(bare) + 1):
        if full[i : i + len(bare)] == bare:
            return list(full[:i])
    return []
