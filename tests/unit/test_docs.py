"""The documentation says what is there: links, commands, names, tables, generated pages."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import lighten
from lighten.registry import exporters, families

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from programs import load

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(p == "runs" or p[0] == "." for p in path.relative_to(ROOT).parts)
)
IDS = [path.relative_to(ROOT).as_posix() for path in PAGES]
each_page = pytest.mark.parametrize("page", PAGES, ids=IDS)


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return load(ROOT / "scripts" / "reference.py")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return load(ROOT / "benchmarks" / "tables.py")


def blocks(text: str, language: str) -> Iterator[str]:
    """The fenced blocks of one language."""
    yield from re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """The page without its code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchor(heading: str) -> str:
    """How a heading is linked to: lower case, punctuation dropped, blanks as hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, part = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{target} is not there"
        assert there.is_relative_to(ROOT), f"{target} leaves the repository"
        if part:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert part in {anchor(h) for h in headings}, f"{target}: no such heading"


@each_page
def test_commands_can_be_typed(page: Path, reference: ModuleType) -> None:
    verbs = reference.verbs()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in blocks(page.read_text(encoding="utf-8"), "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                assert set(words[1:]) <= targets, line
            elif words[:1] == ["python"]:
                assert (ROOT / words[1]).is_file(), line
            elif words[:1] == ["lighten"]:
                assert words[1] in verbs, line
                check_verb(words[2:], verbs[words[1]][1], line)


def check_verb(words: list[str], parameters: list[object], line: str) -> None:
    """Every option exists, has its value, and as many arguments are there as the verb takes."""
    options = {w: p for p in parameters if not p.is_argument for w in p.words}  # type: ignore[attr-defined]
    arguments = [p for p in parameters if p.is_argument]  # type: ignore[attr-defined]
    given, rest = 0, iter(words)
    seen = set()
    for word in rest:
        if not word.startswith("-"):
            given += 1
            continue
        assert word in options, f"{word} in: {line}"
        seen.add(word)
        if options[word].type != "switch":  # type: ignore[attr-defined]
            assert next(rest, "-").startswith("-") is False, f"{word} without a value in: {line}"
    least = sum(p.default == "required" for p in arguments)  # type: ignore[attr-defined]
    many = any(w.endswith("...") for p in arguments for w in p.words)  # type: ignore[attr-defined]
    assert least <= given <= (given if many else len(arguments)), line
    needed = {w for w, p in options.items() if p.default == "required"}  # type: ignore[attr-defined]
    assert needed <= seen, line


def test_a_wrong_command_is_noticed(reference: ModuleType) -> None:
    parameters = reference.verbs()["compress"][1]
    check_verb(["m", "--budget", "4bpw", "--json"], parameters, "right")
    for wrong in (["m", "--buget", "4bpw"], ["m", "--budget"], ["--budget", "4bpw"], ["m", "n"]):
        with pytest.raises(AssertionError):
            check_verb(wrong, parameters, "wrong")
    with pytest.raises(AssertionError):
        check_verb(["run"], reference.verbs()["plan"][1], "budget missing")


@each_page
def test_python_compiles_and_uses_public_names(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "lighten":
                assert node.attr in lighten.__all__, f"lighten.{node.attr}"


@each_page
def test_json_parses(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "json"):
        json.loads(block)


def test_both_readmes_have_one_structure() -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")]
    shapes = []
    for text in texts:
        outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        shapes.append(
            {
                "headings": [h.count("#") for h in re.findall(r"^#+ ", outside, re.MULTILINE)],
                "markers": re.findall(r"<!-- [\w-]+:(?:begin|end) -->", text),
                "bash": list(blocks(text, "bash")),
                "python": list(blocks(text, "python")),
                "output": list(blocks(text, "text")),
                "rows": sum(line.startswith("|") for line in outside.splitlines()),
                "links": sorted(set(re.findall(r"\]\(((?!README)[^)]*)\)", text))),
            }
        )
    assert shapes[0] == shapes[1]
    assert shapes[0]["bash"][0].split()[:2] == ["make", "demo"]


def test_generated_pages_are_up_to_date(reference: ModuleType) -> None:
    for path, text in reference.pages().items():
        assert path.read_text(encoding="utf-8") == text, "run: python scripts/reference.py"


def test_tables_are_those_of_the_json(tables: ModuleType) -> None:
    for path, text in tables.pages().items():
        assert path.read_text(encoding="utf-8") == text, "run: python benchmarks/tables.py"


def test_tables_show_what_they_are_given(tables: ModuleType, tmp_path: Path) -> None:
    ours = {
        "name": "90.9 MB", "bytes": 90_890_000, "kld_mean": 0.05, "kld_mean_err": 0.001,
        "kld_p99": 0.3, "top1": 0.9, "ppl": 29.5, "peer": "IQ4_XS", "peer_bytes": 90_897_760,
        "peer_kld_mean": 0.1063, "ratio": 0.4704, "generate_tokens_per_second": 51.25,
        "peer_generate_tokens_per_second": 50.0,
    }  # fmt: skip
    (tmp_path / "gguf_quality").mkdir()
    (tmp_path / "gguf_quality" / "ours.json").write_text(json.dumps([ours, {"name": "alone"}]))
    (tmp_path / "compress_time").mkdir()
    (tmp_path / "compress_time" / "result.json").write_text(
        json.dumps(
            {
                "ours": {"wall_seconds": 50.0, "peak_rss_bytes": 1_000_000_000},
                "peer": {"wall_seconds": 200.0},
                "ratio_wall": 0.25,
            }
        )
    )
    row = "| 90.9 | 0.0500 ± 0.0010 | IQ4_XS | 90.9 | 0.1063 | 0.47 |"
    assert row in tables.results("en", tmp_path)
    assert row in tables.results("zh", tmp_path)
    assert "alone" in tables.gguf_quality(tmp_path)
    assert "| 90.0 % | 29.50 | 51.2 | IQ4_XS |" in tables.gguf_quality(tmp_path)
    assert "| wall seconds | 50 s | 3 min 20 s | 0.25 |" in tables.compress_time(tmp_path)
    assert "| peak rss bytes | 1,000.00 MB |  |  |" in tables.compress_time(tmp_path)
    assert tables.encode_speed(tmp_path) == "Not measured yet."
    with pytest.raises(ValueError, match="no place"):
        tables.fill("no marker here", "results", "")


def test_supported_formats_name_every_exporter_and_family() -> None:
    text = (ROOT / "docs/reference/file-formats-supported.md").read_text(encoding="utf-8")
    missing = [name for name in (*exporters, *families) if f"| `{name}` |" not in text]
    assert not missing


def test_the_python_page_names_all_that_is_public() -> None:
    text = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)", text)) | set(re.findall(r"\*\*`(\w+)", text))
    assert set(lighten.__all__) <= named


def test_pages_that_the_code_names_are_there() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        for name in re.findall(r"see (docs/[\w./-]+\.md)", path.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{path.name} names {name}"


def test_every_page_is_reached_from_the_index() -> None:
    text = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / t).resolve() for t in re.findall(r"\]\(([^)#]+)\)", text)}
    pages = {path.resolve() for path in (ROOT / "docs").rglob("*.md")}
    assert pages - {(ROOT / "docs/README.md").resolve()} <= linked


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) < 80
