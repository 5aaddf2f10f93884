"""Where a compressed language model differs: passages token by token, and how both go on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lighten.model import Model
from lighten.results import as_gguf
from lighten.runtimes import llama_cpp

WINDOWS = 6
"""Windows that are kept, those with the largest mean divergence."""

PASSAGE = 256
"""Tokens that are kept of a window: where it differs most."""

CONTINUED = 48
"""Tokens that a prompt is continued by."""

_PROMPT = 240
"""Characters of held-out text that are at most taken as a prompt."""

QUESTION = "Give three tips for staying healthy."

_BEFORE = 8
"""Tokens before the first that are decoded with it: tokens of a sentence's start look different."""

_SMALL = 10**9
"""Weights up to which llama.cpp is given one thread: it is fast enough, and several that wait for
each other are slow where other programs run."""


def passages(tokenizer: Any, windows: Tensor, kld: Tensor) -> list[dict[str, Any]]:
    """The windows that differ most, the worst first.

    windows: (count, length) token ids. kld: (count, length - 1) nats at the position that predicts
    the next token. Of each {"mean_kld" (of the whole window), "window" (its number), "start",
    "tokens" (their text), "kld" (of the prediction of each)}. A character that is spread over
    several tokens is one entry with the sum of theirs.
    """
    means = kld.float().mean(1)
    found = []
    for index in means.argsort(descending=True, stable=True)[:WINDOWS].tolist():
        row = kld[index].float()
        size = min(PASSAGE, len(row))
        start = int(row.unfold(0, size, 1).mean(1).argmax())
        ids = windows[index].tolist()
        pieces = texts(tokenizer, ids, start + 1, start + 1 + size)
        ends = [sum(count for _, count in pieces[: i + 1]) for i in range(len(pieces))]
        nats = row[start : start + size].tolist()
        found.append(
            {
                "mean_kld": float(means[index]),
                "window": index,
                "start": start + 1,
                "tokens": [text for text, _ in pieces],
                "kld": [
                    round(sum(nats[end - count : end]), 4)
                    for end, (_, count) in zip(ends, pieces, strict=True)
                ],
            }
        )
    return found


def texts(tokenizer: Any, ids: list[int], start: int, stop: int) -> list[tuple[str, int]]:
    """What the tokens from start to stop add to the text: (text, how many tokens it takes).

    A character that is spread over several tokens is one piece. *Source:* the way in which servers
    stream text: a token's text is what it adds to that of those just before.
    """
    found: list[tuple[str, int]] = []
    first, done, count = max(0, start - _BEFORE), start, 0
    for i in range(start, stop):
        old, new = decoded(tokenizer, ids[first:done]), decoded(tokenizer, ids[first : i + 1])
        count += 1
        if i + 1 < stop and (new.endswith("\ufffd") or len(new) <= len(old)):
            continue  # the rest of the character follows
        found.append((new[len(old) :], count))
        first, done, count = done, i + 1, 0
    return found


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """The text of some tokens, special ones and blanks as they are."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def prompt_of(tokenizer: Any, windows: Tensor, kld: Tensor | None) -> str:
    """A prompt from held-out text: from the start of a sentence, some forty words.

    Of the half of the windows that differ least, where that is known, the one that is most made of
    words: a table or a formula tells little.
    """
    means = torch.zeros(len(windows)) if kld is None else kld.float().mean(1)
    half = means.argsort(stable=True)[: (len(windows) + 1) // 2].tolist()
    prompts = [_beginning(tokenizer, windows[index]) for index in half]
    return max(prompts, key=lambda text: sum(map(str.isalpha, text)) / max(1, len(text)))


def _beginning(tokenizer: Any, window: Tensor) -> str:
    text = str(tokenizer.decode(window.tolist(), skip_special_tokens=True))
    begin = re.search(r"(?:[.!?][\"'\u201d\u2019)]*|\n)\s+(?=\S)", text[: len(text) // 2])
    text = (text[begin.end() :] if begin else text)[:_PROMPT].strip()
    return text[: text.rfind(" ")].rstrip() if " " in text else text


def continuation(
    model: Model,
    exported: Path,
    windows: Tensor,
    kld: Tensor | None = None,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """{"continuation", "chat"}: {"prompt", "before", "after"}, the likeliest token each time.

    windows, kld: as for `passages`. chat: the answer to a question, of models with a chat template.
    Empty where llama.cpp is not there, or the original too large to be written for it.
    """
    if exported.suffix != ".gguf" or not llama_cpp.available():
        return {}
    asked = {"continuation": (prompt_of(model.tokenizer, windows, kld), False)}
    if getattr(model.tokenizer, "chat_template", None):
        asked["chat"] = (QUESTION, True)
    threads = 1 if model.parameters <= _SMALL else None
    found: dict[str, Any] = {}
    with as_gguf(model) as original:
        if original is None:
            return {}
        for name, (prompt, chat) in asked.items():
            if not prompt:
                continue
            found[name] = {"prompt": prompt}
            for side, path in (("before", original), ("after", exported)):
                found[name][side] = llama_cpp.complete(
                    path, prompt, max_tokens=CONTINUED, chat=chat, threads=threads
                ).strip()
                tick()
    return found
