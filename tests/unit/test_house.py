"""The rules of the house, read from the source itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lighten

PACKAGE = Path(lighten.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = {
    path: ".".join(("lighten", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    )
    for path in FILES
}
NOUNS = {"lighten.types", "lighten.registry", "lighten.errors"}
PLUG_INS = (
    "formats",
    "solvers",
    "criteria",
    "losses",
    "transforms",
    "exporters",
    "families",
)
# What the plug-ins of one folder share. It stands on the nouns alone, so a plug-in still knows
# nothing of models, runs or pipelines.
SHARED = {
    "formats": {"lighten.scale_search", "lighten.super_block"},
    "solvers": {
        "lighten.checked",
        "lighten.exchange",
        "lighten.soft_rounding",
        "lighten.sparse",
        "lighten.sweep",
    },
    "criteria": {"lighten.checked", "lighten.sweep"},
    "losses": {"lighten.seen"},  # what a network shows, and the checks of its shapes
    "transforms": {
        "lighten.channels",
        "lighten.network",
        "lighten.quantized",
        "lighten.ranges",
        "lighten.rewrite",
        "lighten.walk",
    },
    "exporters": {
        "lighten.containers",
        "lighten.gguf_file",
        "lighten.network",
        "lighten.onnx_graph",
        "lighten.onnx_matmul_nbits",
        "lighten.onnx_pads",
        "lighten.onnx_qdq",
        "lighten.quantized",
        "lighten.sparse",
        "lighten.tensors",
    },
}
# An exporter reads back what it wrote as a user's model would be opened.
OPENS = {"exporters": {"lighten.model"}}
OPTIONAL = {
    "PIL",
    "accelerate",
    "compressed_tensors",
    "keras",
    "lightning",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "optuna",
    "pyarrow",
    "psutil",
    "ray",
    "tensorboard",
    "xllamacpp",
}
SLOW_TO_IMPORT = {"transformers", "huggingface_hub"}
PUBLIC: list[str] = [
    "Budget",
    "Compressed",
    "Model",
    "Network",
    "Plan",
    "Pruned",
    "Quantized",
    "Result",
    "Spec",
    "UserError",
    "compare",
    "compress",
    "criteria",
    "distill",
    "export",
    "exporters",
    "families",
    "formats",
    "inspect",
    "load",
    "load_text",
    "losses",
    "open_model",
    "prune",
    "quality",
    "quantize",
    "recover",
    "replan",
    "solvers",
    "write_onnx",
]
"""lighten.__all__, pinned: a change here is a change of the public face. At most 30."""

parametrize_files = pytest.mark.parametrize("path", FILES, ids=[NAMES[path] for path in FILES])


def imports(tree: ast.AST) -> Iterator[str]:
    """Names of the modules that a piece of code imports; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield f"relative import in line {node.lineno}"
            module = node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def ours(path: Path) -> set[str]:
    """Modules of lighten that a file imports, anywhere in it."""
    modules = set(NAMES.values())
    found = {name for name in imports(parse(path)) if name in modules and name != "lighten"}
    packages = {name for name in found if any(other.startswith(f"{name}.") for other in found)}
    return found - packages


def on_import(path: Path) -> ast.Module:
    """The statements that run when a file is imported: no function bodies, no TYPE_CHECKING."""

    class Runs(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    tree = Runs().visit(parse(path))
    assert isinstance(tree, ast.Module)
    return tree


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def within(name: str, allowed: set[str]) -> bool:
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


@pytest.mark.parametrize("name", sorted(NOUNS))
def test_the_nouns_know_nothing_else_of_ours(name: str) -> None:
    path = PACKAGE / f"{name.removeprefix('lighten.')}.py"
    assert ours(path) <= NOUNS


@pytest.mark.parametrize("folder", [f for f in PLUG_INS if (PACKAGE / f).is_dir()])
def test_a_plug_in_knows_the_nouns_its_folder_and_what_the_folder_shares(folder: str) -> None:
    allowed = NOUNS | {f"lighten.{folder}"} | SHARED.get(folder, set()) | OPENS.get(folder, set())
    for path in (PACKAGE / folder).glob("*.py"):
        strange = {name for name in ours(path) if not within(name, allowed)}
        assert not strange, f"{path.name} imports {sorted(strange)}"


@pytest.mark.parametrize("folder", sorted(SHARED))
def test_what_plug_ins_share_stands_on_the_nouns(folder: str) -> None:
    for path in FILES:
        if within(NAMES[path], SHARED[folder]):
            allowed = NOUNS | {shared for names in SHARED.values() for shared in names}
            strange = {name for name in ours(path) if not within(name, allowed)}
            assert not strange, f"{NAMES[path]} imports {sorted(strange)}"


@parametrize_files
def test_nothing_imports_the_command_line(path: Path) -> None:
    assert "lighten.cli" not in ours(path)
    assert not any(name.startswith("relative") for name in imports(parse(path)))


@parametrize_files
def test_optional_and_slow_packages_are_imported_inside_functions(path: Path) -> None:
    eager = {name.partition(".")[0] for name in imports(on_import(path))}
    assert not eager & (OPTIONAL | SLOW_TO_IMPORT)


def test_import_lighten_is_light() -> None:
    code = (
        "import sys, lighten\n"
        f"heavy = {OPTIONAL | SLOW_TO_IMPORT!r} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_plug_in_can_be_discovered_without_optional_packages() -> None:
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL | SLOW_TO_IMPORT!r}))\n"
        "from lighten.listing import listing\n"
        "assert all(listing().values())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_public_face_is_pinned() -> None:
    public = list(getattr(lighten, "__all__", []))
    assert sorted(public) == sorted(PUBLIC)
    assert len(public) <= 30
    assert all(hasattr(lighten, name) for name in public)


def test_a_public_name_stays_what_it_is_whatever_is_imported() -> None:
    code = (
        "import importlib, types, lighten\n"
        "from lighten.registry import Registry\n"
        f"for name in {sorted(set(NAMES.values()))!r}:\n"
        "    importlib.import_module(name)\n"
        "import lighten.formats\n"
        "public = {name: getattr(lighten, name) for name in lighten.__all__}\n"
        "assert not [n for n, v in public.items() if isinstance(v, types.ModuleType)]\n"
        "assert all(isinstance(public[n], Registry) for n in ('formats', 'solvers', 'exporters'))\n"
        "assert 'q4_0' in lighten.formats"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@parametrize_files
def test_no_module_is_long_without_a_reason(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    reason = "Long because" in (ast.get_docstring(parse(path)) or "")
    assert reason or len(text.splitlines()) <= 400
    assert ast.get_docstring(parse(path)), "the first line says what the file is for"


def test_no_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [name for name in NAMES.values() if drawers & set(name.split("."))]


@parametrize_files
def test_no_pickle_is_loaded(path: Path) -> None:
    tree = parse(path)
    pickles = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not pickles & {name.partition(".")[0] for name in imports(tree)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if ast.unparse(node.func) == "torch.load":
            assert options.get("weights_only") == "True", f"line {node.lineno}"
        assert options.get("allow_pickle", "False") == "False", f"line {node.lineno}"


@parametrize_files
def test_mistakes_are_errors_not_asserts(path: Path) -> None:
    lines = [
        node.lineno
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Assert)
        # the one for the type checker, about a value that this file itself made
        if not re.fullmatch(r"[\w.]+ is not None", ast.unparse(node.test))
    ]
    assert not lines, "python -O removes asserts; raise one of lighten.errors"


@parametrize_files
def test_options_are_named_not_passed_through(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef) and node.args.kwarg is not None:
            name, kind = node.args.kwarg.arg, node.args.kwarg.annotation
            if kind is not None and ast.unparse(kind) == "Tensor":
                continue  # data by name, not options
            forwarded = [
                k
                for call in ast.walk(node)
                if isinstance(call, ast.Call)
                for k in call.keywords
                if k.arg is None and ast.unparse(k.value) == name
            ]
            assert not forwarded, f"{node.name} hands **{name} on"


def test_no_path_of_one_machine(repo_root: Path) -> None:
    folders = ("src", "tests", "docs", "benchmarks", "examples", "scripts", ".ci")
    kinds = {".py", ".md", ".json", ".toml", ".txt", ".sh", ""}
    found = [
        path
        for folder in folders
        for path in (repo_root / folder).rglob("*")
        if path.is_file() and path.suffix in kinds
        if re.search(r"/(work|tmp|root|home/\w+)/", path.read_text(encoding="utf-8"))
    ]
    assert not found
