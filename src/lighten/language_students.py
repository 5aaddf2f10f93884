"""Students made from a language model: fewer blocks, narrower feed-forward parts, its own weights.

    notes = make_language_student(teacher, LanguageSpec.parse("half depth", 30), windows, folder)
    open_model(folder)      # a Hugging Face folder, its words those of the teacher

No graph is needed: a block is a block, and a feed-forward part is known by its shapes. What is
written is checked to compute what the teacher does without what was left out.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import Tensor

from lighten.block_importance import Shallow, evenly, shallowest
from lighten.language_spec import LanguageSpec
from lighten.model import Model
from lighten.narrow_feed_forward import feed_forwards, units_of, write_narrow
from lighten.progress import stage
from lighten.smaller_model import (
    check_same,
    feed_forward_width,
    fewer_layers,
    write_fresh,
    write_shallow,
)


def make_language_student(
    teacher: Model, spec: LanguageSpec, windows: Tensor, path: Path, *, multiple: int = 1,
    seed: int = 0,
) -> list[str]:  # fmt: skip
    """Write the student as a Hugging Face folder; what a reader should know of how it was made.

    windows: (count, length) token ids that blocks and units are chosen on. multiple: units of
    feed-forward parts are a multiple of it. Raises WrongUse where this model cannot be cut so.
    """
    check_spec(teacher, spec)
    if spec.scratch:
        return _fresh(teacher, spec, path, multiple, seed)
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="lighten-", dir=path.parent) as temporary:
        whole, narrow = teacher, spec.width < 1
        if spec.layers < spec.of:
            with stage("judge blocks", spec.of, "blocks") as tick:
                best, other = shallowest(teacher, windows, spec.layers, tick)
            place = Path(temporary) / "shallow" if narrow else path
            whole = write_shallow(teacher, place, best.kept)
            check_same(whole, windows[:1], best.outputs, f"{spec.layers} of {spec.of} layers")
            notes.append(_said(best, other, spec.of))
        if narrow:
            with stage("narrow feed-forward parts", len(whole.blocks), "blocks") as tick:
                made, expected, units = write_narrow(
                    whole, path, spec.width, windows, multiple, tick
                )
            check_same(made, windows[:1], expected, f"{spec.width:g} of the width")
            notes.append(_width(whole, units))
        elif whole is teacher:
            write_shallow(teacher, path, range(spec.of))
    return notes


def check_spec(teacher: Model, spec: LanguageSpec) -> None:
    """Raises WrongUse where the config or the blocks of this model cannot be cut so."""
    if spec.layers < spec.of:
        fewer_layers(teacher, range(spec.layers))
    if spec.width < 1:
        feed_forwards(teacher)


def _fresh(teacher: Model, spec: LanguageSpec, path: Path, multiple: int, seed: int) -> list[str]:
    notes, kept = [], evenly(spec.of, spec.layers)
    changes = fewer_layers(teacher, kept) if spec.layers < spec.of else {}
    if spec.width < 1:
        key, units = feed_forward_width(teacher)
        changes[key] = units_of(spec.width, units, multiple)
        notes.append(_width(teacher, changes[key]))
    with stage("draw weights"):
        write_fresh(teacher, path, changes, seed)
    return [f"{spec.layers} of {spec.of} layers, weights drawn anew", *notes]


def _said(best: Shallow, other: Shallow, of: int) -> str:
    kept = ", ".join(str(i) for i in best.kept)
    return (
        f"{len(best.kept)} of {of} blocks stay, {best.how}: {kept} ({best.kld:.3g} nats from the"
        f" teacher before it learns; {other.how}: {other.kld:.3g})"
    )


def _width(model: Model, units: int) -> str:
    _, before = feed_forward_width(model)
    return (
        f"width is that of the feed-forward parts: {units} of {before} units stay in each block;"
        " heads and hidden states are as wide as they were"
    )
