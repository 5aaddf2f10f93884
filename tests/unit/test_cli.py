"""The command line: what goes to stdout and stderr, exit codes, hints; the work itself is faked."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lighten import cli, demo, progress, summary
from lighten.errors import BadInput, BadOutput, MissingPackage, UnknownName, WrongUse
from lighten.listing import kinds, listing
from lighten.run import Run, default_folder

METRICS = {
    "model": "tiny",
    "before": {"bytes": 269_000_000, "perplexity": 28.3},
    "after": {
        "bytes": 79_900_000,
        "perplexity": 30.1,
        "mean_kld": {"value": 0.12, "low": 0.11, "high": 0.13},
    },
    "notes": ["calibrated on the text that lighten has"],
}


@pytest.fixture(autouse=True)
def _talkative() -> Any:
    yield
    progress.be_quiet(False)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for lighten.pipeline that records how it was called."""
    from lighten import front

    fake: Any = types.ModuleType("lighten.pipeline")
    fake.calls = []
    fake.metrics = dict(METRICS)

    def compress(model: str, **options: Any) -> Any:
        fake.calls.append((model, options))
        if isinstance(fake.metrics, BaseException):
            raise fake.metrics
        return types.SimpleNamespace(metrics=fake.metrics, exported=Path("x.gguf"))

    fake.compress = compress
    monkeypatch.setattr(front, "compress_language_model", compress)
    fake.replan = lambda run, budget: {"run": run, "budget": budget}
    fake.export = lambda run, to: run / "exports" / f"model.{to}"
    monkeypatch.setitem(sys.modules, "lighten.pipeline", fake)
    monkeypatch.setattr("lighten.pipeline", fake, raising=False)
    return fake


def test_compress_passes_what_was_asked_and_prints_the_table(pipeline: Any, capsys: Any) -> None:
    line = "compress tiny --budget 80MB --data a.txt --samples 4 --length 16 --seed 3 --out r"
    assert cli.main(line.split()) == 0
    [(model, options)] = pipeline.calls
    assert model == "tiny"
    assert options == {
        "budget": "80MB",
        "max_kld": None,
        "data": Path("a.txt"),
        "export": "gguf",
        "out": Path("r"),
        "samples": 4,
        "length": 16,
        "seed": 3,
        "recover": None,
        "learn_from": None,
        "patience": None,
        "even_columns": False,
    }
    out, err = capsys.readouterr()
    assert "269 MB  " in out
    assert "79.9 MB" in out
    assert "0.120 nats (0.110–0.130)" in out
    assert "note: calibrated on" in out
    assert err == ""


def test_json_is_all_that_stdout_gets(pipeline: Any, capsys: Any) -> None:
    pipeline.metrics["after"]["perplexity"] = float("inf")
    assert cli.main(["compress", "tiny", "--budget", "80MB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["before"] == METRICS["before"]
    assert found["after"]["perplexity"] is None  # JSON has no infinity
    pipeline.metrics["after"]["perplexity"] = 30.1


def test_worse_than_the_baseline_exits_1_and_says_so(pipeline: Any, capsys: Any) -> None:
    pipeline.metrics["problems"] = ["worse than q4_0 at the same bytes: 0.31 against 0.30"]
    assert cli.main(["compress", "tiny", "--budget", "80MB", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["problems"]
    assert err == "error: worse than q4_0 at the same bytes: 0.31 against 0.30\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadInput("model.safetensors ends at 3 of 8 bytes", "download it again"), 1),
        (BadOutput("the file does not open [in llama.cpp]", ""), 1),
        (WrongUse("budget `80` has no unit", "write 80MB"), 2),
        (UnknownName("unknown exporter `ggfu`", "did you mean `gguf`?"), 2),
    ],
)
def test_a_mistake_is_two_lines(pipeline: Any, capsys: Any, error: Any, code: int) -> None:
    pipeline.metrics = error
    assert cli.main(["compress", "tiny", "--quiet"]) == code
    hint = f"hint: {error.hint}\n" if error.hint else ""
    assert capsys.readouterr() == ("", f"error: {error.message}\n{hint}")


def test_a_bug_keeps_its_traceback(pipeline: Any) -> None:
    pipeline.metrics = ZeroDivisionError("bug")
    with pytest.raises(ZeroDivisionError):
        cli.main(["compress", "tiny"])


def test_stopped_says_how_to_go_on(pipeline: Any, capsys: Any) -> None:
    pipeline.metrics = KeyboardInterrupt()
    assert cli.main(["compress", "a model", "--budget", "25%"]) == 130
    assert "\n  lighten compress 'a model' --budget 25%\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("compres tiny", "did you mean `compress`?"),
        ("compress tiny --budgt 80MB", "did you mean `--budget`"),
        ("compress", "Missing argument 'MODEL'"),
        ("compress tiny --samples few", "for '--samples'"),
        ("compress tiny --samples 0", "for '--samples'"),
        ("plan runs/x", "Missing option '--budget'"),
        ("list formts", "did you mean `formats`?"),
        ("report nowhere", "nowhere is not a run"),
    ],
)
def test_wrong_use_exits_2_with_the_nearest_name(line: str, said: str, capsys: Any) -> None:
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert "\nhint: " in err
    assert "Traceback" not in err


def test_plan_and_export_call_the_pipeline(pipeline: Any, capsys: Any) -> None:
    assert cli.main(["plan", "runs/x", "--budget", "70MB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": str(Path("runs/x")), "budget": "70MB"}
    assert cli.main(["export", "runs/x", "--to", "onnx"]) == 0
    assert capsys.readouterr().out.strip() == str(Path("runs/x/exports/model.onnx"))


def test_report_shows_a_run(tmp_path: Path, capsys: Any) -> None:
    with Run.open(tmp_path / "run", {"model": "tiny", "budget": "80MB"}) as run:
        run.json("plan", dict)
        assert cli.main(["report", str(tmp_path / "run")]) == 0
        assert "not finished" in capsys.readouterr().out
        run.json("metrics", lambda: METRICS)
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "79.9 MB" in out
    assert "metrics.json" in out
    assert "not finished" not in out


def test_inspect_says_where_the_bytes_are(tiny: Any, capsys: Any) -> None:
    assert cli.main(["inspect", str(tiny("llama")), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == facts["architecture"] == "llama"
    assert sum(row["bytes"] for row in facts["tensors"]) == facts["bytes"]
    assert sum(row["macs_share"] for row in facts["tensors"]) == pytest.approx(1)
    rows = {row["tensor"]: row for row in facts["tensors"]}
    down = rows["model.layers.*.mlp.down_proj"]
    assert (down["count"], down["shape"]) == (2, "64x96")
    assert "q4_0" in down["fits"]
    assert "256" in down["refused"]["q4_k"]
    assert "fits" not in rows["model.norm"]
    assert cli.main(["inspect", str(tiny("llama"))]) == 0
    assert "model.layers.*.mlp.down_proj " in capsys.readouterr().out


def test_list_names_everything(capsys: Any) -> None:
    found = listing()
    assert set(found) >= {"formats", "solvers", "exporters", "families"}
    for kind, rows in found.items():
        assert sorted(str(row["name"]) for row in rows) == sorted(kinds()[kind])
        assert all(row["doc"] for row in rows), kind
    said = [row["doc"] for kind in ("solvers", "criteria") for row in found[kind]]
    assert len(set(said)) == len(said)
    [q4_k] = [row for row in found["formats"] if row["name"] == "q4_k"]
    assert (q4_k["bits_per_weight"], q4_k["rows_of"]) == (4.5, "any multiple of 256")
    assert cli.main(["list", "formats"]) == 0
    assert "q4_k " in capsys.readouterr().out


def test_the_help_of_list_names_every_kind(capsys: Any) -> None:
    assert cli.main(["list", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert not [kind for kind in kinds() if kind not in said]


def test_default_folder_names_the_wish() -> None:
    assert default_folder("org/name", "25%") == Path("runs/name-25pc")
    assert default_folder("a/b.gguf", None, 0.05) == Path("runs/b-kld0.05")
    with pytest.raises(WrongUse, match="neither"):
        default_folder("a", None)


def test_the_demo_finds_its_model_without_importing_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / demo.PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackage, match="model is missing"):
        demo.find_model()
    (package / "model.gguf").write_bytes(b"GGUF")
    assert demo.find_model() == package / "model.gguf"
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
    with pytest.raises(MissingPackage) as caught:
        demo.find_model()
    assert "pip install" in caught.value.hint


def test_the_demo_asks_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Any, capsys: Any
) -> None:
    from lighten.runtimes import llama_cpp

    asked = []
    monkeypatch.setattr(demo, "find_model", lambda: tmp_path / "m.gguf")
    monkeypatch.setattr(llama_cpp, "available", lambda: True)
    monkeypatch.setattr(llama_cpp, "complete", lambda *a, **_: asked.append(a) or " Paris. \n")
    assert cli.main(["demo", "--out", str(tmp_path), "--prompt", "Where?"]) == 0
    assert asked == [(Path("x.gguf"), "Where?")]
    out = capsys.readouterr().out
    assert "answer" in out
    assert "Paris." in out
    assert "79.9 MB" in out
    (tmp_path / "metrics.json").write_text("{}")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 0
    assert "is done already" in capsys.readouterr().err


def _python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, **options
    )


def test_help_and_version_import_no_torch() -> None:
    code = (
        "import sys, lighten.cli\n"
        "assert lighten.cli.main(['--help']) == 0\n"
        "assert lighten.cli.main(['compress', '--help']) == 0\n"
        "assert lighten.cli.main(['--version']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = _python(code)
    assert done.returncode == 0, done.stderr
    assert "--max-kld" in done.stdout
    assert "lighten 0." in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell with pipes")
def test_a_closed_pipe_is_no_matter() -> None:
    line = f"{sys.executable} -W error -m lighten.cli list | head -n 1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_stages_are_plain_lines_where_nobody_watches(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress.stage("quick", total=1) as tick:
        tick()
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with progress.stage("solve"), progress.stage("calibrate", total=3, unit="blocks") as tick:
        tick(2)
        tick()
    with pytest.raises(ValueError, match="no"), progress.stage("fails"):
        raise ValueError("no")
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.rsplit(" ", 2)[0] for line in err.splitlines()] == [
        "calibrate 3/3 blocks",
        "solve",
    ]
    progress.be_quiet()
    with progress.stage("calibrate"):
        progress.note("hushed")
    assert capsys.readouterr().err == ""


def test_bars_come_and_go_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import time

    from rich.console import Console

    screen = io.StringIO()
    monkeypatch.setattr(progress, "_console", Console(file=screen, force_terminal=True, width=80))
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with progress.stage("outer"), progress.stage("inner", total=2) as tick:
        tick()
        for _ in range(500):
            if "1/2" in screen.getvalue():
                break
            time.sleep(0.01)
        assert "1/2" in screen.getvalue()
        tick()
    assert progress._bars is None
    assert "inner 2/2" in screen.getvalue()


def test_quantities_read_as_their_keys_say() -> None:
    assert summary.quantity("generate_tokens_per_second", 81.234) == "81.2"
    assert summary.quantity("load_seconds", 0.42) == "0.4 s"
    assert summary.quantity("parameters", 134_515_008) == "134,515,008"
    assert summary.quantity("max_kld", None) == "-"
