"""What a run keeps to be looked at: weights side by side, passages, the curve, stages."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lighten import stage_log
from lighten.errors import BadOutput
from lighten.look import keep
from lighten.look.language import command
from lighten.look.language_curve import curve, ends, other_budgets, trust
from lighten.look.language_differences import continuation, passages, prompt_of, texts
from lighten.look.provenance import machine, provenance, versions
from lighten.look.weights import MOST_LEVELS, histogram, levels, relative_error, sampled
from lighten.progress import stage
from lighten.registry import formats, solvers
from lighten.run import Run
from lighten.sparse import format_of, nearest
from lighten.types import Candidate, Compressed, Plan, Spec, Stats


# -- weights ------------------------------------------------------------------------------------
def test_a_histogram_counts_every_weight_once() -> None:
    w = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    w[0, 0] = 1000.0  # one outlier does not push all others into one bin
    found = histogram(w, w.round())
    assert len(found["edges"]) == 33
    assert found["edges"] == sorted(found["edges"])
    assert sum(found["before"]) == sum(found["after"]) == w.numel()
    assert max(found["before"]) < w.numel() / 8
    assert max(found["after"]) > w.numel() / 4


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_a_histogram_of_equal_weights(value: float) -> None:
    found = histogram(torch.full((4, 8), value), None)
    assert sum(found["before"]) == 32
    assert len(set(found["edges"])) == 33
    assert "after" not in found


def test_large_layers_are_seen_through_a_sample_of_rows() -> None:
    assert sampled(64, 64) is None
    rows = sampled(50_000, 576)
    assert rows is not None
    assert rows[0] == 0
    assert rows[-1] == 49_999
    assert len(rows) * 576 <= 2**18
    assert sampled(3, 2**20) is not None


@pytest.mark.parametrize("name", sorted(formats))
def test_the_levels_of_a_block_hold_all_its_weights(name: str) -> None:
    format = formats[name]
    shape = (6, 512)
    if format.accepts(shape):
        pytest.skip(f"{name} does not take {shape}")
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    stats = Stats(64, torch.eye(512))
    weight: Compressed = solvers["rtn"](w, stats, Spec(format=name, solver="rtn"))
    found = levels(weight)
    if found is None:
        return
    assert len(found) <= MOST_LEVELS
    assert found == sorted(found)
    block = weight.dense()[3, : format.block or 512]
    if getattr(format, "sub", 0) not in (0, format.block):
        block = block[: format.sub]
    nearest = (block[:, None] - torch.tensor(found)).abs().min(1).values
    assert float(nearest.max()) <= 1e-3 * float(w.abs().max())


def test_some_formats_have_levels_to_show() -> None:
    w = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    stats = Stats(64, torch.eye(512))
    found = levels(solvers["rtn"](w, stats, Spec(format="q4_0", solver="rtn")))
    assert found is not None
    assert 12 <= len(found) <= 16


@pytest.mark.parametrize("name", ["int4_g32", "int4_g32_sym", "f32"])
def test_levels_of_what_was_pruned(name: str) -> None:
    """The row that is shown has hardly anything left, or nothing at all."""
    w = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    whole: Compressed = solvers["rtn"](w, None, Spec(format=name, solver="rtn"))
    for left in (0, 1):
        kept = torch.ones(5, 64, dtype=torch.bool)
        kept[2, : 64 - left] = False
        spec = Spec.parse(f"{name}+0.5")
        sparse = nearest(w, kept, format_of(spec), None, spec)
        assert torch.equal(sparse.dense() != 0, whole.dense().where(kept, torch.zeros(())) != 0)
        found = levels(sparse)
        assert found is None if name == "f32" else found is not None and 0 in found


def test_the_relative_error() -> None:
    w = torch.ones(3, 4)
    assert relative_error(w, w) == 0
    assert relative_error(w, 0 * w) == pytest.approx(1)
    assert relative_error(0 * w, w) == 0


# -- passages -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_pieces_of_text_join_to_the_text(words: Callable[..., Any], kind: str) -> None:
    tokenizer = words(kind)
    text = "The river bends twice. 你好，世界。 Where does it go? नमस्ते"
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = texts(tokenizer, ids, 0, len(ids))
    assert sum(count for _, count in pieces) == len(ids)
    whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert "".join(piece for piece, _ in pieces) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece, _ in pieces)
    later = texts(tokenizer, ids, 5, len(ids))
    assert sum(count for _, count in later) == len(ids) - 5


def test_the_worst_windows_come_first_where_they_are_worst(words: Callable[..., Any]) -> None:
    tokenizer = words("bytes")
    ids = torch.tensor(tokenizer.encode("The mill by the river. " * 200)[:1200]).view(3, 400)
    kld = torch.full((3, 399), 0.01)
    kld[1, 300:320] = 2.0
    kld[2] = 0.05
    found = passages(tokenizer, ids, kld)
    assert [w["window"] for w in found] == [1, 2, 0]
    first = found[0]
    assert first["mean_kld"] == pytest.approx(float(kld[1].mean()))
    assert len(first["tokens"]) == len(first["kld"])
    assert sum(k > 1 for k in first["kld"]) == 20
    at = next(i for i, k in enumerate(first["kld"]) if k > 1)
    assert first["start"] + at == 301  # position 300 predicts token 301
    assert sum(first["kld"]) == pytest.approx(20 * 2.0 + 236 * 0.01, rel=1e-3)


def test_short_windows_are_whole(words: Callable[..., Any]) -> None:
    tokenizer = words("bytes")
    ids = torch.tensor([tokenizer.encode("The mill by the river.")[:12]])
    [found] = passages(tokenizer, ids, torch.rand(1, 11))
    assert found["start"] == 1
    assert math.isfinite(found["mean_kld"])


def test_a_prompt_is_words_from_the_start_of_a_sentence(words: Callable[..., Any]) -> None:
    tokenizer = words("bytes")
    texts_ = ["4 | 5 | 6 | 7. | 8 | 9 | " * 9, "and so. Nine pears were found by the mill. " * 9]
    ids = [tokenizer.encode(text, add_special_tokens=False)[:120] for text in texts_]
    size = min(map(len, ids))
    table, prose = (torch.tensor(row[:size]) for row in ids)
    near, far = torch.zeros(size - 1), torch.full((size - 1,), 9.0)
    windows = torch.stack([table, prose, prose, table])
    prompt = prompt_of(tokenizer, windows, torch.stack([near, near, far, far]))
    assert prompt.startswith("Nine pears")
    assert not prompt.endswith(" ")
    assert prompt == prompt_of(tokenizer, windows, None)
    # where it differs it tells little, whatever it is made of
    assert "pears" not in prompt_of(tokenizer, windows, torch.stack([near, far, far, near]))


def test_without_llama_cpp_nothing_is_continued(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lighten.model import open_model
    from lighten.runtimes import llama_cpp

    model = open_model(tiny("llama"))
    ids = torch.zeros(1, 8, dtype=torch.long)
    assert continuation(model, tmp_path, ids) == {}  # a folder
    monkeypatch.setattr(llama_cpp, "available", lambda: False)
    assert continuation(model, tmp_path / "a.gguf", ids) == {}


def test_both_models_go_on_with_the_same_prompt(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lighten.model import open_model
    from lighten.runtimes import llama_cpp

    asked = []

    def complete(path: Path, prompt: str, *, chat: bool, **_: Any) -> str:
        asked.append((path.name, prompt, chat))
        assert path.exists() or path.name == "small.gguf"
        return f"said by {path.name} "

    monkeypatch.setattr(llama_cpp, "available", lambda: True)
    monkeypatch.setattr(llama_cpp, "complete", complete)
    model = open_model(tiny("llama"))
    ids = torch.tensor([model.tokenizer.encode("Nine pears. Where does it go then? " * 5)[:90]])
    found = continuation(model, tmp_path / "small.gguf", ids)
    assert found["continuation"]["after"] == "said by small.gguf"
    assert found["continuation"]["before"] == "said by original-f16.gguf"
    assert {prompt for _, prompt, chat in asked if not chat} == {found["continuation"]["prompt"]}
    assert ("chat" in found) == bool(getattr(model.tokenizer, "chat_template", None))


# -- the curve ----------------------------------------------------------------------------------
def candidates() -> list[Candidate]:
    rows = []
    for unit, size in (("a", 1000.0), ("b", 3000.0), ("c", 500.0)):
        for spec, share, nats in (
            ("keep", 1.0, 0.0), ("q8_0@gptq", 0.5, 1e-4), ("q4_0@gptq", 0.25, 0.02),
        ):  # fmt: skip
            rows.append(Candidate(unit, {unit: spec}, nats * size / 1000, {"bytes": share * size}))
    return rows


def metrics(lost: float) -> dict[str, Any]:
    before = {"bytes": 4600, "perplexity": 9.0}
    after = {"bytes": 2350, "mean_kld": {"value": lost, "low": 0.0, "high": 1.0},
             "perplexity": 9.5, "perplexity_ratio": 1.05}  # fmt: skip
    return {"before": before, "after": after, "plan": "allocated"}


def test_other_budgets_reach_from_the_smallest_to_everything_kept() -> None:
    rows = candidates()
    assert ends(rows, 100) == (100 + 1125, 100 + 4500)
    plans = other_budgets(rows, 100)
    sizes = [plan.predicted["bytes"] for plan in plans]
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1225
    assert sizes[-1] == 4600
    nats = [plan.predicted["nats"] for plan in plans]
    assert nats == sorted(nats, reverse=True)


def test_points_of_the_curve_say_how_they_are_known() -> None:
    rows = candidates()
    plan = Plan({"a": "q8_0@gptq"}, {}, {"nats": 0.01, "bytes": 2350.0})
    plain = Plan({"a": "q4_0@gptq"}, {}, {"nats": 0.09, "bytes": 1225.0})
    found = {"mean_kld": {"value": 0.02, "low": 0.0, "high": 1.0}}
    worse = {"mean_kld": {"value": 0.5, "low": 0.0, "high": 1.0}, "windows": 3}
    measured = {"allocated": (plan, found), "uniform": (plain, worse)}
    assert trust(measured.values()) == pytest.approx(2.0)
    points = curve(rows, 100, measured, metrics(0.02))
    assert [p["source"] for p in points[:3]] == ["original", "this plan", "uniform"]
    assert points[0]["mean_kld"] == 0
    assert points[0]["bytes"] == 4600
    assert points[2]["bytes"] == 1225
    assert points[2]["measured"]
    predicted = [p for p in points if not p["measured"]]
    assert {p["source"] for p in predicted} == {"other budget", "uniform"}
    for point in predicted:
        assert point["mean_kld"] == pytest.approx(2 * point["predicted_kld"])
    names = [p["plan"] for p in predicted if p["source"] == "uniform"]
    assert sorted(names) == ["q4_0", "q8_0"]


def test_without_a_measurement_predictions_stand_as_they_are() -> None:
    assert trust([]) == 1.0
    assert trust([(Plan({}, {}, {}), {"mean_kld": 0.1})]) == 1.0


# -- provenance ---------------------------------------------------------------------------------
def test_the_line_that_makes_a_run_again() -> None:
    class Text:
        builtin, source = False, "my text.txt"

    request = {"source": "org/model", "budget": "80MB", "max_kld": None, "export": "gguf",
               "samples": 64, "length": 512, "seed": 0, "recover": "50steps"}  # fmt: skip
    words = command(request, Text())  # type: ignore[arg-type]
    assert words[:3] == ["lighten", "compress", "org/model"]
    assert words[words.index("--data") + 1] == "my text.txt"
    assert words[words.index("--recover") + 1] == "50steps"
    assert "--max-kld" not in words
    assert "--even-columns" not in words
    assert "--even-columns" in command(request | {"columns": "even"}, Text())  # type: ignore[arg-type]
    assert "None" not in words


def test_provenance_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_log, "WORTH", 0.0)
    with Run.open(tmp_path / "run", {"a": 1}) as run:
        with stage_log.logged(run), stage("work"), stage("inside"):
            pass
        with stage_log.logged(run), stage("work"):
            pass
        with stage("unheard"):
            pass
        told = provenance(run, ["lighten", "a b"], model={"source": "m"}, data={}, seed=3)
    assert told["command"] == "lighten 'a b'"
    assert told["seed"] == 3
    assert [row["stage"] for row in told["stages"]] == ["work"]
    assert told["versions"].keys() >= {"python", "torch", "lighten"}
    assert told["began"] <= told["ended"]
    assert told["ended"].endswith("Z")
    assert versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert machine()["cores"] >= 1


def test_a_stage_that_failed_is_not_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_log, "WORTH", 0.0)
    with Run.open(tmp_path / "run", {"a": 1}) as run, stage_log.logged(run):
        with pytest.raises(ValueError), stage("broken"):
            raise ValueError
        with stage("whole"):
            pass
        assert [row["stage"] for row in stage_log.spent(run)] == ["whole"]


def test_what_cannot_be_looked_at_loses_no_run(tmp_path: Path) -> None:
    def refused() -> Any:
        raise BadOutput("llama.cpp does not open it")

    def wrong() -> Any:
        raise KeyError("a mistake")

    with Run.open(tmp_path / "run", {"a": 1}) as run:
        assert not keep(run, "layers", refused)
        with pytest.warns(RuntimeWarning, match="a mistake"):
            assert not keep(run, "layers", wrong)
        assert keep(run, "layers", lambda: [1], given="x")
        assert keep(run, "layers", lambda: [2], given="x")
        assert run.json("look/layers", dict, given="x") == [1]
