"""A Hugging Face tokenizer as GGUF fields: tokens, types, scores, merges, special ids, template.

Two kinds of tokenizer cover the families: byte-level BPE ("gpt2" in GGUF, which also needs the
name of its pre-tokenizer), and BPE over characters with byte fallback, as SentencePiece makes it
("llama", where scores stand for the order of merges).

*Source:* llama.cpp, src/llama-vocab.cpp (the pre-tokenizers' regular expressions, how each kind
of token is matched) and ggml's docs/gguf.md (field names).
"""

from __future__ import annotations

import json
from typing import Any

from lighten.errors import WrongUse

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?{0}*{1}+{2}|[^\r\n\p{L}\p{N}]?{0}+{1}*{2}|"
_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(suffix: str, digits: str) -> str:
    """Words that change case split; `suffix` may follow them."""
    words = _CASED.replace("{0}", _UPPER).replace("{1}", _LOWER).replace("{2}", suffix)
    return words + digits + _SLASH


PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (_WORD + r"\p{N}" + _REST,): "qwen2",
    (
        _WORD.replace(r"\p{L}+", r"[\p{L}\p{M}]+")
        + r"\p{N}"
        + _REST.replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"),
    ): "qwen35",
    (_WORD + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_cased("", r"\p{N}"),): "tekken",
    (_cased(_CONTRACTIONS + "?", r"\p{N}{1,3}"),): "gpt-4o",
}
"""The pre-tokenizer's steps (a regular expression, or a word) -> llama.cpp's name for them."""


def fields(tokenizer: Any, rows: int) -> dict[str, Any]:
    """The `tokenizer.*` fields. rows: of the embedding; ids beyond the vocabulary are unused ones.

    Raises WrongUse where llama.cpp has no such tokenizer.
    """
    body = json.loads(_fast(tokenizer).to_str())
    model = body["model"]
    if model["type"] != "BPE":
        raise WrongUse(
            f"a tokenizer of type {model['type']} cannot be written into a GGUF",
            "export a Hugging Face folder (`--export huggingface`)",
        )
    out: dict[str, Any] = {}
    if _byte_level(body):
        out["tokenizer.ggml.model"] = "gpt2"
        out["tokenizer.ggml.pre"] = pre_tokenizer(body) or "default"
        tokens, types = _tokens(body, rows, spaces=False)
        out["tokenizer.ggml.tokens"], out["tokenizer.ggml.token_type"] = tokens, types
        out["tokenizer.ggml.merges"] = [_merge_text(m) for m in _merges(model)]
    else:
        out["tokenizer.ggml.model"] = "llama"
        out["tokenizer.ggml.pre"] = "default"
        tokens, types = _tokens(body, rows, spaces=True)
        out["tokenizer.ggml.tokens"] = tokens
        out["tokenizer.ggml.scores"] = _scores(model, tokens)
        out["tokenizer.ggml.token_type"] = types
        out["tokenizer.ggml.add_space_prefix"] = _space_prefix(body)
    out.update(_special(tokenizer, rows))
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several by name; llama.cpp reads one
        template = template.get("default")
    if template:
        out["tokenizer.chat_template"] = template
    return out


def note(tokenizer: Any) -> str | None:
    """What a person should know about this tokenizer in llama.cpp, or None."""
    body = json.loads(_fast(tokenizer).to_str())
    if body["model"]["type"] == "BPE" and _byte_level(body) and pre_tokenizer(body) is None:
        return (
            "the pre-tokenizer is none that lighten knows: the GGUF says `default`,"
            " and llama.cpp may split words otherwise"
        )
    return None


def _fast(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise WrongUse(
            "the model has no tokenizer that GGUF can hold"
            if tokenizer is None
            else f"{type(tokenizer).__name__} has no tokenizer.json form",
            "put a tokenizer.json into the model's folder, or export a Hugging Face folder",
        )
    return backend


# -- pre-tokenizer -----------------------------------------------------------------------------
def _flat(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a Sequence, or the one step, or none."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [s for inner in step[key] for s in _flat(inner, key)]
    return [step]


def _byte_level(body: dict[str, Any]) -> bool:
    steps = _flat(body.get("pre_tokenizer"), "pretokenizers")
    steps += _flat(body.get("normalizer"), "normalizers")
    return any(s["type"] == "ByteLevel" for s in steps)


def pre_tokenizer(body: dict[str, Any]) -> str | None:
    """llama.cpp's name of the pre-tokenizer in a tokenizer.json, or None where it is unknown."""
    steps: list[str] = []
    for step in _flat(body.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "ByteLevel":
            if step.get("use_regex", True):
                steps.append("bytes")
        elif step["type"] == "Digits" and step.get("individual_digits"):
            steps.append("digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            steps.append(step["pattern"].get("Regex", ""))
        else:
            steps.append(step["type"])
    return PRE_TOKENIZERS.get(tuple(steps))


def restore_pre_tokenizer(tokenizer: Any, name: str) -> bool:
    """Give a byte-level tokenizer the pre-tokenizer that llama.cpp calls `name`; False: unknown.

    transformers opens every GGUF as if it were "gpt-2".
    """
    from tokenizers import Regex, pre_tokenizers

    steps = next((steps for steps, known in PRE_TOKENIZERS.items() if known == name), None)
    if steps is None:
        return False
    made: list[Any] = []
    for step in steps:
        if step == "digits":
            made.append(pre_tokenizers.Digits(individual_digits=True))
        elif step != "bytes":
            made.append(pre_tokenizers.Split(Regex(step), "isolated"))
    regex = steps[-1] == "bytes"
    made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex))
    _fast(tokenizer).pre_tokenizer = made[0] if len(made) == 1 else pre_tokenizers.Sequence(made)
    return True


def _space_prefix(body: dict[str, Any]) -> bool:
    steps = _flat(body.get("normalizer"), "normalizers")
    if any(s["type"] == "Prepend" for s in steps):
        return True
    return any(
        s["type"] == "Metaspace" and s.get("prepend_scheme", "always") != "never"
        for s in _flat(body.get("pre_tokenizer"), "pretokenizers")
    )


# -- tokens ------------------------------------------------------------------------------------
def _tokens(body: dict[str, Any], rows: int, spaces: bool) -> tuple[list[str], list[int]]:
    """Texts and types of ids 0..rows-1."""
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [UNUSED] * rows
    fallback = bool(body["model"].get("byte_fallback"))
    for text, i in body["model"]["vocab"].items():
        if i >= rows:
            continue
        is_byte = fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        tokens[i], types[i] = text, BYTE if is_byte else NORMAL
        if spaces and text == body["model"].get("unk_token"):
            types[i] = UNKNOWN
    for added in body.get("added_tokens", []):
        i, text = added["id"], added["content"]
        if i >= rows:
            continue
        if added["special"]:
            tokens[i] = text
            types[i] = types[i] if types[i] in (UNKNOWN, BYTE) else CONTROL
        else:
            # such tokens are cut out of the raw text, where a space is a space
            tokens[i], types[i] = text.replace("▁", " ") if spaces else text, USER_DEFINED
    return tokens, types


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    return [(left, right) for left, right in pairs]


def _merge_text(pair: tuple[str, str]) -> str:
    """One space separates the pair, so a space inside goes by its byte-level letter."""
    return " ".join(part.replace(" ", "Ġ") for part in pair)


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """Minus the rank of the first merge that makes a token; what no merge makes comes last."""
    rank: dict[str, int] = {}
    for left, right in _merges(model):
        rank.setdefault(left + right, len(rank))
    return [-float(rank.get(t, len(rank))) for t in tokens]


def _special(tokenizer: Any, rows: int) -> dict[str, Any]:
    """Ids of special tokens, and whether a text gets the first and last of them."""
    out: dict[str, Any] = {}
    names = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    for ours, theirs in (*names, ("sep", "seperator"), ("mask", "mask")):
        i = getattr(tokenizer, f"{ours}_token_id", None)
        if isinstance(i, int) and i < rows:
            out[f"tokenizer.ggml.{theirs}_token_id"] = i
    ids = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    bos, eos = out.get("tokenizer.ggml.bos_token_id"), out.get("tokenizer.ggml.eos_token_id")
    out["tokenizer.ggml.add_bos_token"] = bos is not None and ids[:1] == [bos]
    out["tokenizer.ggml.add_eos_token"] = eos is not None and len(ids) > 1 and ids[-1:] == [eos]
    return out
