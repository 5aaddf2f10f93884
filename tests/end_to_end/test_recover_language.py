"""compress --recover on tiny language models: the same bytes, less lost, resumed, refused."""

from __future__ import annotations

import copy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import lighten
from lighten import errors, pipeline, recover_language
from lighten.data import load_text
from lighten.learned_blocks import is_head
from lighten.model import open_model
from lighten.registry import exporters
from lighten.results import results  # noqa: F401  (imported before anything is replaced in it)
from lighten.run import Run
from lighten.solve import Weights

pytest.importorskip("lightning")

Tiny = Callable[..., Path]
TOKENS, BLOCK_STEPS, WINDOWS = 128, 4, 16
KILLED = Path(__file__).parent / "killed_recovery.py"
ASKED: dict[str, Any] = {"samples": 4, "length": 32, "recover": "6steps"}


@pytest.fixture(autouse=True)
def _quick(untimed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small steps."""
    monkeypatch.setattr(recover_language, "TOKENS", TOKENS)
    monkeypatch.setattr(recover_language, "BLOCK_STEPS", BLOCK_STEPS)
    monkeypatch.setattr(recover_language, "HEAD_WINDOWS", WINDOWS)


def check_steps(metrics: dict[str, Any]) -> None:
    """Each step has the numbers that are elsewhere too: nothing is measured for it alone."""
    plans = {row["plan"]: row for row in metrics["plans"]}
    steps = {row.pop("step"): row for row in copy.deepcopy(metrics["steps"])}
    assert list(steps) == ["original", "quantized", "recovered", "exported"]
    assert steps["original"] == {"perplexity": metrics["before"]["perplexity"]}
    facts = metrics["recover"][0]
    assert steps["quantized"]["mean_kld"]["value"] == facts["mean_kld_before"]
    assert steps["recovered"]["mean_kld"] == plans["recovered"]["mean_kld"]
    assert steps["recovered"]["top1_agreement"] == plans["recovered"]["top1_agreement"]
    assert steps["exported"] == {key: metrics["after"][key] for key in steps["exported"]}
    taken = "recovered" if facts["taken"] == "yes" else "quantized"
    assert steps["exported"] == steps[taken]
    assert steps["exported"].keys() == {"perplexity", "top1_agreement", "mean_kld"}


def size(path: Path) -> int:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(p.stat().st_size for p in files)


@pytest.mark.parametrize(
    ("family", "export", "budget", "learn_from"),
    [
        ("llama", "gguf", "45%", None),
        ("gemma3_text", "gguf", "45%", "topk:1:k=16"),
        ("gpt2", "gguf", "45%", "logits:1,labels:0.01"),
        ("llama", "compressed_tensors", "60%", None),
    ],
)
def test_it_learns_back_in_the_same_bytes_and_once(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    family: str, export: str, budget: str, learn_from: str | None,
) -> None:  # fmt: skip
    def ask() -> pipeline.Result:
        return lighten.compress(
            tiny(family), budget=budget, data=text, export=export, out=tmp_path / "run",
            learn_from=learn_from, **ASKED,
        )  # fmt: skip

    done = ask()
    facts = done.metrics["recover"][0]
    plans = {row["plan"]: row for row in done.metrics["plans"]}
    before = min(plans[name]["mean_kld"]["value"] for name in plans if name != "recovered")
    assert facts["mean_kld_before"] == before
    assert facts["mean_kld_after"] == plans["recovered"]["mean_kld"]["value"]
    assert facts["taken"] == ("yes" if facts["mean_kld_after"] <= before else "no")
    assert done.metrics["after"]["mean_kld"]["value"] == min(before, facts["mean_kld_after"])
    check_steps(done.metrics)
    specs = {k: lighten.Spec.parse(v) for k, v in done.plan.specs.items()}
    assert size(done.exported) == exporters[export].nbytes(open_model(tiny(family)), specs)
    assert facts["watched_kld_after"] <= facts["watched_kld_before"]
    blocks = facts["blocks"]
    model = open_model(tiny(family))
    head = next(layer.name for layer in model.layers if is_head(layer))
    learned = [*model.blocks, *([head] if head in specs and specs[head].format else [])]
    assert [row["block"] for row in blocks["errors"]] == learned
    assert all(row["after"] <= row["before"] for row in blocks["errors"])
    worse = blocks["watched_kld_after"] > blocks["watched_kld_before"]
    assert blocks["taken"] == ("no" if worse else "yes")
    monkeypatch.setattr(recover_language, "learn", None)
    again = ask()
    assert again.metrics == done.metrics
    exported = lighten.export(done.run, export)  # what was learned is what is written
    assert exported == done.exported


@pytest.mark.parametrize(("most", "mode"), [(10**9, "all"), (1000, "scales")])
def test_codes_learn_in_the_whole_of_models_that_are_not_large(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, mode: str
) -> None:
    monkeypatch.setattr(recover_language, "CODES", most)
    monkeypatch.setattr(recover_language, "BLOCK_STEPS", 0)  # the whole alone
    monkeypatch.setattr(recover_language, "FACTORS", recover_language.FACTORS | {"offset": 1e3})
    better = count(-100.0)  # each state than the one before
    monkeypatch.setattr(recover_language.Watched, "__call__", lambda self, student: next(better))
    monkeypatch.setattr(recover_language, "take", lambda run, old, new, *_: new)
    out = tmp_path / "run"
    done = lighten.compress(tiny("llama"), budget="45%", data=text, out=out, **ASKED)
    run, model = Run.at(out, lock=False), open_model(tiny("llama"))
    (facts,) = done.metrics["recover"]
    assert facts["mode"] == mode
    now, before = (Weights(run, model, done.plan, *at) for at in (("recover",), ()))
    moved = False
    for name in before:
        old, new = (each[name] for each in (before, now))
        codes = [each.format.unpack(each.parts, each.shape)[0] for each in (old, new)]
        moved |= not codes[0].equal(codes[1])
    assert moved == (mode == "all")


def test_a_recovery_that_breaks_down_does_not_lose_the_run(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = recover_language.learn
    monkeypatch.setattr(
        recover_language, "learn", lambda *given, **how: learn(*given, **(how | {"rate": 1e30}))
    )
    done = lighten.compress(
        tiny("llama"), budget="45%", data=text, export="gguf", out=tmp_path / "run", **ASKED
    )
    assert done.exported.exists()
    (learned,) = done.metrics["recover"]
    assert learned["broke"].startswith("learning broke down at step")
    assert learned["watched_kld_after"] <= learned["watched_kld_before"]
    assert any("broke down" in problem for problem in done.metrics["problems"])


@pytest.mark.parametrize("worse", [True, False])
def test_a_head_that_makes_it_worse_is_left_as_it_was(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worse: bool
) -> None:
    seen = iter([-3.0, -2.0, -1.0] if worse else [-3.0, -1.0, -2.0])
    there = recover_language.Watched.__call__

    def judged(self: Any, student: Any) -> float:
        return next(seen, None) or there(self, student)

    monkeypatch.setattr(recover_language.Watched, "__call__", judged)
    given: list[Any] = []
    student = recover_language.LanguageStudent

    def attached(model: Any, weights: Any, **options: Any) -> Any:
        given.append(weights)
        return student(model, weights, **options)

    monkeypatch.setattr(recover_language, "LanguageStudent", attached)
    out = tmp_path / "run"
    done = lighten.compress(tiny("llama"), budget="45%", data=text, out=out, **ASKED)
    blocks = done.metrics["recover"][0]["blocks"]
    assert (blocks["taken"], blocks["head"]) == ("yes", "no" if worse else "yes")
    assert blocks["watched_kld_after"] == 1.0
    (head,) = [la.name for la in open_model(tiny("llama")).layers if is_head(la)]
    solved = Weights(Run.at(out, lock=False), open_model(tiny("llama")), done.plan)
    same = all(a.equal(given[0][head].parts[k]) for k, a in solved[head].parts.items())
    assert same == worse
    assert len(list(given[0])) == len(given[0]) == len(solved)


def test_norms_that_learned_are_in_the_file(
    tiny: Tiny, text: Path, tmp_path: Path, undocumented: Callable[[Path], set[str]]
) -> None:
    out = tmp_path / "run"
    done = lighten.compress(tiny("llama"), budget="45%", data=text, out=out, **ASKED)
    assert not undocumented(out)
    assert done.metrics["recover"][0]["taken"] == "yes"
    name = "model.layers.0.mlp.gate_proj.weight"
    assert name in done.plan.specs
    new, old = open_model(done.exported), open_model(tiny("llama"))
    norm = next(n for n in old.tensors if n.endswith("norm.weight"))
    assert not new.tensors[norm].load().equal(old.tensors[norm].load())
    other = lighten.export(out, "huggingface")  # in another form they are the same numbers
    assert open_model(other).tensors[norm].load().float().equal(new.tensors[norm].load())


def test_a_gguf_learns_as_well(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    exporters["gguf"].write(open_model(tiny("llama")), {}, source)
    done = lighten.compress(source, budget="45%", data=text, out=tmp_path / "run", **ASKED)
    assert done.metrics["recover"][0]["taken"] == "yes"
    new, old = open_model(done.exported), open_model(source)
    norm = next(n for n in old.tensors if n.endswith("norm.weight"))
    assert not new.tensors[norm].load().equal(old.tensors[norm].load())


def test_what_is_worse_on_held_out_text_is_not_taken(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = lighten.compress(
        tiny("llama"), budget="45%", data=text, out=tmp_path / "plain", samples=4, length=32
    )
    measured = pipeline.measure_weights

    def worse(model: Any, windows: Any, weights: Any, *rest: Any) -> dict[str, Any]:
        found = measured(model, windows, weights, *rest)
        if model.changed:
            found["mean_kld"]["value"] = 9.0  # type: ignore[index]
        return found

    monkeypatch.setattr(pipeline, "measure_weights", worse)
    done = lighten.compress(tiny("llama"), budget="45%", data=text, out=tmp_path / "run", **ASKED)
    assert done.metrics["recover"][0]["taken"] == "no"
    check_steps(done.metrics)
    assert "steps" not in plain.metrics
    assert done.metrics["after"]["mean_kld"] == plain.metrics["after"]["mean_kld"]
    named = [p.read_bytes().replace(b"run", b"plain") for p in (done.exported, plain.exported)]
    assert named[0] == named[1]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_while_it_learns_it_goes_on_to_the_same_file(
    tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    def ask(out: Path) -> pipeline.Result:
        return lighten.compress(tiny("llama"), budget="45%", data=text, out=out, **ASKED)

    whole = ask(tmp_path / "a" / "run")
    out = tmp_path / "b" / "run"
    shutil.copytree(whole.run, out)  # all stages before learning
    shutil.rmtree(out / "recover")
    shutil.rmtree(out / "exports")
    (out / "metrics.json").unlink()
    # a process of its own: a fork would inherit threads of this one that no longer run
    words = [tiny("llama"), text, out, "step-", "3"]
    child = subprocess.run([sys.executable, KILLED, *map(str, words)], check=False)
    assert child.returncode == -signal.SIGKILL
    assert {p.name for p in (out / "recover").iterdir()} == {"blocks", "learning"}
    assert list((out / "recover" / "learning").glob("step-*.safetensors"))
    again = ask(out)
    assert again.exported.read_bytes() == whole.exported.read_bytes()


@pytest.mark.parametrize("seed", [0, 3])
def test_what_is_learned_from_is_not_measured_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    for i in range(60):
        lines = (f"Text {i}, line {j}: {i * j} of {i + j * j}." for j in range(12))
        (tmp_path / f"{i:02}.txt").write_text("\n".join(lines))
    seen: dict[str, Any] = {}
    learn, job_of = recover_language._learn, pipeline.job_of

    def learned(*rest: Any) -> None:
        seen["learned"] = rest[3]
        learn(*rest)

    def job(*rest: Any) -> Any:
        seen["job"] = job_of(*rest)
        return seen["job"]

    monkeypatch.setattr(recover_language, "_learn", learned)
    monkeypatch.setattr(pipeline, "job_of", job)
    lighten.compress(
        tiny("llama"), budget="45%", data=tmp_path, out=tmp_path / "run", seed=seed, **ASKED
    )
    from_text = {tuple(row) for row in seen["learned"].tolist()}
    for part in (seen["job"].calibration, seen["job"].held_out):
        assert not from_text & {tuple(row) for row in part.tolist()}
    assert len(from_text) == len(seen["learned"])


def test_it_stops_where_patience_ends(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recover_language.Watched, "__call__", lambda *_: -1.0)
    asked = {**ASKED, "recover": "10steps", "budget": "45%", "data": text, "out": tmp_path / "run"}
    found = lighten.compress(tiny("llama"), patience=1, **asked)
    assert found.metrics["recover"][0]["steps"] == 2  # a fifth of all, where it was evaluated
    with pytest.raises(errors.ChangedRequest, match="another request"):
        lighten.compress(tiny("llama"), patience=2, **asked)
    with pytest.raises(errors.WrongUse, match="patience without recover"):
        pipeline.compress(tiny("llama"), **{**asked, "recover": None, "patience": 2})


def test_few_steps_leave_no_less_text_to_blocks(tiny: Tiny, text: Path) -> None:
    corpus, tokenizer = load_text(text), open_model(tiny("llama")).tokenizer

    def count(length: str) -> int:
        return len(recover_language.lessons(corpus, tokenizer, 16, 3, length))

    assert count("1steps") == recover_language.WATCHED + WINDOWS
    assert count("100steps") > count("1steps")


def test_too_little_text_and_lessons_that_cannot_be(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(text.read_text()[:1200])
    ask: dict[str, Any] = {"samples": 200, "length": 32, "recover": "6steps", "budget": "45%"}
    with pytest.raises(errors.BadInput, match="no text is left to learn from") as error:
        lighten.compress(tiny("llama"), data=short, out=tmp_path / "run", **ask)
    assert not (tmp_path / "run").exists()  # before anything is computed
    fits = int(error.value.hint.rpartition(" ")[2])
    enough: dict[str, Any] = {**ask, "samples": fits, "data": short, "out": tmp_path / "run"}
    assert lighten.compress(tiny("llama"), **enough).metrics["recover"][0]["steps"] == 6
    with pytest.raises(errors.WrongUse, match="hidden"):
        lighten.compress(
            tiny("llama"), data=text, out=tmp_path / "other", learn_from="hidden:1", **ask
        )
    assert not (tmp_path / "other").exists()
