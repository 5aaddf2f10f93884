"""A group lasso as the penalty of the loop: it grows, presses, and resumes with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from killed_learning import data
from torch import nn

from lighten.coupling import couple
from lighten.course import ImageCourse
from lighten.group_lasso import GroupLasso
from lighten.learn import learn
from lighten.lesson import Lesson
from lighten.network import Network
from linear_students import CPU, same

pytest.importorskip("lightning", reason="learning needs lightning")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("proximal", [True, False])
def test_a_group_lasso_presses_units_to_zero_and_goes_on_after_a_stop(
    tmp_path: Path, proximal: bool
) -> None:
    x = data(3, 128)[:, 0, 0]
    y = (x[:, 0] > 0).long()

    def pressed(folder: Path | None, stop_at: int = 0) -> tuple[nn.Module, GroupLasso]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        lasso = GroupLasso(
            module, couple(Network.of(module, x[:2])), strength=1e-3, growth=2e-4,
            proximal=proximal,
        )  # fmt: skip

        def stop(step: int, steps: int) -> None:
            if step == stop_at:
                raise KeyboardInterrupt

        learn(
            module, None, Lesson.parse("labels"), ImageCourse(x, y), length="150steps", rate=0.2,
            batch=32, evaluate=lambda m: 0.0, keep_given=False, penalty=lasso, folder=folder,
            save_every=1, after_step=[stop], every=150, **CPU,
        )  # fmt: skip
        return module, lasso

    module, lasso = pressed(None)
    assert lasso.weight == pytest.approx(1e-3 + 150 * 2e-4)
    (norm,) = lasso.norms().values()
    if proximal:  # a penalty in the loss makes them small, the step makes them zero
        assert int((norm == 0).sum()) >= 8
    else:
        assert float(norm.sort().values[:8].max()) < 0.2 * float(norm.max())
    assert float((module(x).argmax(1) == y).double().mean()) > 0.8
    with pytest.raises(KeyboardInterrupt):
        pressed(tmp_path, stop_at=40)
    again, _ = pressed(tmp_path)
    assert same(again, module)
