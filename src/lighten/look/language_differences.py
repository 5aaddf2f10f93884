"""Where a compressed language model differs: passages token by token, and how both go on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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

_PROMPT = 320
"""Characters of held-out text that are at most taken as a prompt."""

QUESTION = "Give three tips for staying healthy."

_BEFORE = 16
"""Tokens before one that are decoded with it: a character may be spread over several."""


def passages(tokenizer: Any, windows: Tensor, kld: Tensor) -> list[dict[str, Any]]:
    """The windows that differ most, the worst first.

    windows: (count, length) token ids. kld: (count, length - 1) nats at the position that predicts
    the next token. Of each {"mean_kld" (of the whole window), "window" (its number), "start",
    "tokens" (their text), "kld" (of the prediction of each)}.
    """
    means = kld.float().mean(1)
    found = []
    for index in means.argsort(descending=True, stable=True)[:WINDOWS].tolist():
        row = kld[index].float()
        size = min(PASSAGE, len(row))
        start = int(row.unfold(0, size, 1).mean(1).argmax())
        ids = windows[index].tolist()
        found.append(
            {
                "mean_kld": float(means[index]),
                "window": index,
                "start": start + 1,
                "tokens": texts(tokenizer, ids[start + 1 : start + 1 + size], ids[: start + 1]),
                "kld": [round(float(k), 4) for k in row[start : start + size]],
            }
        )
    return found


def texts(tokenizer: Any, ids: list[int], before: list[int] | None = None) -> list[str]:
    """What each token adds to the text; a character stands where its last token does."""
    return list(_texts(tokenizer, ids, before or []))


def _texts(tokenizer: Any, ids: list[int], before: list[int]) -> Iterator[str]:
    whole, held = [*before, *ids], ""
    for i in range(len(before), len(whole)):
        context = whole[max(0, i - _BEFORE) : i]
        old, new = decoded(tokenizer, context), decoded(tokenizer, [*context, whole[i]])
        if new.endswith("\ufffd") and i + 1 < len(whole):  # the rest of the character follows
            held = held or old.removesuffix("\ufffd")
            yield ""
            continue
        yield new.removeprefix(held or old.rstrip("\ufffd"))
        held = ""


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """The text of some tokens, special ones and blanks as they are."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def prompt_of(tokenizer: Any, window: Tensor) -> str:
    """A prompt from held-out text: from the start of a sentence, some forty words."""
    text = str(tokenizer.decode(window.tolist(), skip_special_tokens=True))
    begin = re.search(r"(?:[.!?][\"'\u201d\u2019)]*|\n)\s+(?=\S)", text[: len(text) // 2])
    text = text[begin.end() :] if begin else text
    text = text[:_PROMPT]
    return text[: text.rfind(" ")].rstrip() if " " in text.strip() else text.strip()


def continuation(
    model: Model, exported: Path, windows: Tensor, tick: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """{"continuation", "chat"}: {"prompt", "before", "after"}, the likeliest token each time.

    chat: the answer to a question, of models with a chat template. Empty where llama.cpp is not
    there, or cannot open what was made or the original.
    """
    if exported.suffix != ".gguf" or not llama_cpp.available():
        return {}
    asked = {"continuation": (prompt_of(model.tokenizer, windows[0]), False)}
    if getattr(model.tokenizer, "chat_template", None):
        asked["chat"] = (QUESTION, True)
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
                    path, prompt, max_tokens=CONTINUED, chat=chat
                ).rstrip()
                tick()
    return found
