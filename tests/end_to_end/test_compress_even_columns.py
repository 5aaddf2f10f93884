"""compress --even-columns on tiny models: what is exported is the model, whatever else is asked."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lighten
from lighten import errors, even_columns, recover_language
from lighten.cli import main
from lighten.even_columns import column_scales, scaled_columns
from lighten.model import open_model
from model_files import logits

Tiny = Callable[..., Path]
SMALL: dict[str, Any] = {"samples": 4, "length": 32}


pytestmark = pytest.mark.usefixtures("untimed")


def uneven(folder: Path, to: Path) -> Path:
    """The same function with columns that are far from even: up to 7 times as large, or as small,
    as they were."""
    model, generator = open_model(folder), torch.Generator().manual_seed(1)
    spread = {
        name: (4 * torch.rand(model.tensors[name].shape[0], generator=generator) - 2).exp()
        for name in column_scales(model)
    }
    shutil.copytree(folder, to)
    tensors = scaled_columns(model, spread).tensors
    save_file({k: t.load().contiguous() for k, t in tensors.items()}, to / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    return to


def said(path: Path) -> Tensor:
    return logits(open_model(path))


def divergence(a: Tensor, b: Tensor) -> float:
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return float(nn.functional.kl_div(q, p, reduction="sum", log_target=True)) / p[..., 0].numel()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_every_form_of_a_run_is_the_same_model(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = uneven(tiny(family), tmp_path / "model")

    def ask(**options: Any) -> Any:
        asked = SMALL | {"even_columns": True} | options
        return lighten.compress(model, budget="60%", data=text, out=tmp_path / "run", **asked)

    done = ask()
    assert "columns were made even before they were rounded" in done.metrics["notes"]
    assert "--even-columns" in (done.run / "look" / "provenance.json").read_text()
    original, exported = said(tiny(family)), said(done.exported)
    # other tokens than those of the text, but far from what a lost factor would cost
    assert divergence(original, exported) < 10 * done.metrics["after"]["mean_kld"]["value"]
    # the run knows by itself that its weights are those of even columns, and never asks again
    monkeypatch.setattr(even_columns, "column_scales", None)
    other = said(lighten.export(done.run, "huggingface"))
    assert divergence(exported, other) < 1e-2 * divergence(original, exported)
    assert ask().metrics == done.metrics
    assert lighten.replan(done.run, "70%")["predicted_kld"] < done.plan.predicted["nats"]
    with pytest.raises(errors.ChangedRequest, match="columns"):
        ask(even_columns=False)


@pytest.mark.parametrize("export", ["gguf", "compressed_tensors"])
def test_it_learns_back_like_any_other(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: str
) -> None:
    pytest.importorskip("lightning")
    monkeypatch.setattr(recover_language, "TOKENS", 128)
    monkeypatch.setattr(recover_language, "BLOCK_STEPS", 40)
    monkeypatch.setattr(recover_language, "HEAD_WINDOWS", 32)
    done = lighten.compress(
        tiny("llama"), budget="45%", data=text, export=export, out=tmp_path / "run",
        recover="16steps", even_columns=True, **SMALL,
    )  # fmt: skip
    facts = done.metrics["recover"][0]
    assert facts["taken"] == "yes"
    assert facts["mean_kld_after"] <= facts["mean_kld_before"]
    if export == "gguf":  # by a fifth; of int4 the watched windows are too few to tell everywhere
        assert facts["mean_kld_after"] < facts["mean_kld_before"]
    other = said(lighten.export(done.run, "huggingface"))
    assert divergence(said(tiny("llama")), other) < 10 * facts["mean_kld_after"]


def test_where_columns_cannot_be_scaled_it_is_told_before_anything(
    tiny: Tiny, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = lighten.compress(tiny("llama"), budget="60%", data=text, out=tmp_path / "a", **SMALL)
    out = tmp_path / "b"
    line = [str(plain.exported), "--budget", "55%", "--data", str(text), "--out", str(out)]
    line += ["--length", "32"]
    assert main(["compress", *line, "--even-columns"]) == 2
    assert "lies on a grid" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(errors.WrongUse, match="even_columns is for language models"):
        lighten.compress(nn.Linear(2, 2), torch.zeros(1, 2), budget="50%", even_columns=True)
