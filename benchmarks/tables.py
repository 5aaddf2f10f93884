"""Render the tables of docs/benchmarks.md and of the READMEs from the JSON of the benchmarks.

    python benchmarks/tables.py [--check]

A table stands between `<!-- name:begin -->` and `<!-- name:end -->`. --check changes nothing and
exits 1 where a page is not what would be written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lighten.summary import label, quantity

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "scripts")]
import learning_tables  # noqa: E402
import network_tables  # noqa: E402
from generated import main  # noqa: E402

ROOT = HERE.parent
NOT_YET = {"en": "Not measured yet.", "zh": "尚未测量。"}
RESULTS = {
    "en": ("lighten, MB", "KLD", "llama.cpp", "MB", "KLD", "ours ÷ theirs"),
    "zh": ("lighten，MB", "KLD", "llama.cpp", "MB", "KLD", "我们 ÷ 对手"),
}
Rows = list[dict[str, Any]]


def results(language: str, folder: Path = HERE) -> str:
    """The README's table: ours beside the best llama.cpp file of the same or smaller size."""
    ours = [row for row in _ours(folder) if "ratio" in row and not row["name"].endswith(" pure")]
    if not ours:
        return NOT_YET[language]
    rows = [
        (_mb(r, "bytes"), _kld(r), _name(r, "peer"), _mb(r, "peer_bytes"),
         _number(r, "peer_kld_mean"), _number(r, "ratio", 2))
        for r in ours
    ]  # fmt: skip
    return _table(RESULTS[language], rows, text=(2,))


def _ours(folder: Path) -> Rows:
    """Our rows, the smallest file first."""
    return sorted(
        _read(folder, "gguf_quality/ours.json") or [], key=lambda row: row.get("bytes", 0)
    )


def gguf_quality(folder: Path = HERE) -> str:
    """Ours with what it is compared to, then every llama.cpp file."""
    ours = _ours(folder)
    peer: Rows = _read(folder, "gguf_quality/peer.json") or []
    head = ("lighten", "MB", "KLD", "p99 KLD", "top-1", "perplexity", "tokens/s",
            "llama.cpp", "MB", "KLD", "tokens/s", "ours ÷ theirs")  # fmt: skip
    mine = [
        (_name(r, "name"), *_quality(r), _number(r, "generate_tokens_per_second", 1),
         _name(r, "peer"), _mb(r, "peer_bytes"), _number(r, "peer_kld_mean"),
         _number(r, "peer_generate_tokens_per_second", 1), _number(r, "ratio", 2))
        for r in ours
    ]  # fmt: skip
    theirs = [
        (_name(r, "name"), *_quality(r), _number(r, "bpw", 2), _types(r.get("types") or {}))
        for r in peer
    ]
    parts = [_table(head, mine, text=(0, 7)) if mine else f"Ours: {NOT_YET['en'].lower()}"]
    if theirs:
        words = ("llama.cpp", "MB", "KLD", "p99 KLD", "top-1", "perplexity", "bits per weight",
                 "types really used")  # fmt: skip
        parts += [
            "All files of llama.cpp, each with the importance matrix. *pure*: the same type"
            " everywhere but for the embedding, which is Q8_0. Rows of 576 do not fit types with"
            " blocks of 256; llama.cpp puts others in their place, as the last column says.",
            _table(words, theirs, text=(0, 7)),
        ]
    return "\n\n".join(parts)


def compress_time(folder: Path = HERE) -> str:
    """Ours and the peer's quantities, one a row, with the ratio of both."""
    found = _read(folder, "compress_time/result.json")
    if not found:
        return NOT_YET["en"]
    ours, peer = found["ours"], found["peer"] or {}
    rows = []
    for key in dict.fromkeys([*ours, *peer]):
        a, b = ours.get(key), peer.get(key)
        if isinstance(a or b, Mapping | list):
            continue
        ratio = f"{a / b:.2f}" if _is_number(a) and _is_number(b) and b else ""
        rows.append((label(key), _shown(key, a), _shown(key, b), ratio))
    table = _table(("", "lighten", "llm-compressor", "ours ÷ theirs"), rows, text=(0,))
    rest = {k: v for k, v in found.items() if isinstance(v, str | int | float)}
    rest |= _flat(found.get("settings") or {})
    lines = [f"{label(k)}: {_shown(k, v)}." for k, v in rest.items()]
    return "\n\n".join([table, " ".join(lines)] if lines else [table])


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, the keys joined by blanks."""
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        inner = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{key} ") if inner else {f"{prefix}{key}": value}
    return flat


def encode_speed(folder: Path = HERE) -> str:
    """Millions of weights per second of each format."""
    found = _read(folder, "encode_speed.json")
    if not found:
        return NOT_YET["en"]
    setup, speeds = found["setup"], found["mweights_per_s"]
    rows = [
        (f"`{name}`", *(f"{s[k]:,.1f}" for k in ("fit", "encode", "both")))
        for name, s in speeds.items()
    ]
    shape = " × ".join(map(str, setup["shape"]))
    about = (
        f"{setup['machine']}, {setup['threads']} threads, torch {setup['torch']}, weights {shape},"
        f" load before: {setup['load_before']}."
    )
    head = ("M weights/s", "fit", "encode", "both")
    return f"{about}\n\n{_table(head, rows, text=(0,))}"


def column_scales(folder: Path = HERE) -> str:
    """The solver's error with columns scaled over that without, the mean over blocks."""
    found = _read(folder, "column_scales/result.json")
    if not found:
        return NOT_YET["en"]
    ratios: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for row in found["rows"]:
        key = (row["copy"], ", ".join(row["layers"]), row["format"])
        ratios.setdefault(key, []).append(row["ratios"])
    ways = list(found["rows"][0]["ratios"])
    rows = [
        (
            copy,
            layers,
            f"`{form}`",
            *(f"{sum(r[way] for r in seen) / len(seen):.3f}" for way in ways),
        )
        for (copy, layers, form), seen in ratios.items()
    ]
    blocks = ", ".join(str(b) for b in dict.fromkeys(row["block"] for row in found["rows"]))
    about = f"Blocks {blocks}, {found['windows']} windows of 512 tokens, torch {found['torch']}."
    return f"{about}\n\n{_table(('copy', 'layers', 'format', *ways), rows, text=(0, 1, 2))}"


def network(found: tuple[str, network_tables.Table] | None) -> str:
    """A sentence and a table of a benchmark on networks."""
    if found is None:
        return NOT_YET["en"]
    text, (head, rows, words) = found
    return f"{text}\n\n{_table(head, rows, text=words)}"


def pages(folder: Path = HERE) -> dict[Path, str]:
    """Path -> what it should hold."""
    wanted = {
        "docs/benchmarks.md": {
            "gguf_quality": gguf_quality(folder),
            "compress_time": compress_time(folder),
            "encode_speed": encode_speed(folder),
            "patterns": network(network_tables.patterns(folder)),
            "resnet56_macs": network(network_tables.resnet56(folder)),
            "efficientnet_int8": network(network_tables.efficientnet(folder)),
            "learned_rounding": network(network_tables.learned_rounding(folder)),
            "column_scales": column_scales(folder),
            "learned_scales": network(learning_tables.learned_scales(folder)),
            "recovery": network(learning_tables.recovery(folder)),
            "recovery_memory": network(learning_tables.recovery_memory(folder)),
            "student": network(learning_tables.student(folder)),
            "sparse_integers": network(network_tables.sparse_integers(folder)),
            "half_latency": network(network_tables.half_latency(folder)),
        },
        "README.md": {"results": results("en", folder)},
        "README.zh-CN.md": {"results": results("zh", folder)},
    }
    found = {}
    for name, tables in wanted.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for marker, table in tables.items():
            text = fill(text, marker, table)
        found[ROOT / name] = text
    return found


def fill(text: str, marker: str, content: str) -> str:
    """The text with `content` between the two comments of `marker`; raises ValueError."""
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    before, there, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not there or not closed:
        raise ValueError(f"no place for `{marker}`: {begin} ... {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def _read(folder: Path, name: str) -> Any:
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _quality(row: Mapping[str, Any]) -> tuple[str, ...]:
    share = f"{100 * row['top1']:.1f} %" if _is_number(row.get("top1")) else ""
    numbers = (_number(row, "kld_p99", 3), share, _number(row, "ppl", 2))
    return (_mb(row, "bytes"), _kld(row), *numbers)


def _kld(row: Mapping[str, Any]) -> str:
    mean, error = row.get("kld_mean"), row.get("kld_mean_err")
    if not _is_number(mean):
        return ""
    spread = f" ± {error:.4f}" if _is_number(error) and error else ""
    return f"{abs(mean) if abs(mean) < 5e-5 else mean:.4f}{spread}"  # no -0.0000


def _number(row: Mapping[str, Any], key: str, digits: int = 4) -> str:
    value = row.get(key)
    return f"{value:,.{digits}f}" if _is_number(value) else ""


def _mb(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return f"{value / 1e6:.1f}" if _is_number(value) else ""


def _name(row: Mapping[str, Any], key: str) -> str:
    return str(row.get(key) or "")


def _types(kinds: Mapping[str, Mapping[str, int]]) -> str:
    """`Q5_0 x 120, Q8_0 x 15`: how many matrices have which type, most first."""
    total: dict[str, int] = {}
    for used in kinds.values():
        for name, count in used.items():
            total[name] = total.get(name, 0) + count
    return ", ".join(f"{n} × {c}" for n, c in sorted(total.items(), key=lambda i: (-i[1], i[0])))


def _shown(key: str, value: Any) -> str:
    key = "share" if key.startswith("share_of_") else key
    return "" if value is None else quantity(key, value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int]) -> str:
    """A Markdown table; columns in `text` are aligned left, all others right."""
    lines = [head, ["---" if i in text else "---:" for i in range(len(head))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main(__doc__, pages))
