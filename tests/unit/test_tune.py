"""The lesson that is chosen: the best of all trials, whatever the order they come in."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("optuna", reason="tuning needs optuna")

from lighten.errors import BadOutput
from lighten.lesson import Lesson
from lighten.tune import Report, tune

ASKED = "logits:1,labels:0.5"


@pytest.mark.parametrize(
    ("values", "best"),
    [([0.2, 0.9, 0.4], 1), ([0.9, 0.2, 0.4], 0), ([-3.0, -2.0, -1.0], 2)],
)
def test_the_trial_of_the_highest_value_is_chosen(
    tmp_path: Path, values: list[float], best: int
) -> None:
    taught: list[str] = []

    def learn(lesson: Lesson, report: Report) -> float:
        taught.append(str(lesson))
        return values[len(taught) - 1]

    found = tune(Lesson.parse(ASKED), len(values), learn, tmp_path)
    assert taught[0] == ASKED
    assert len(set(taught)) == len(values)
    assert str(found.lesson) == taught[best]
    assert [row["value"] for row in found.rows] == values
    assert [row["lesson"] for row in found.rows] == taught
    assert [row["chosen"] for row in found.rows] == ["yes" if i == best else "" for i in range(3)]


def test_a_trial_that_fails_is_not_chosen(tmp_path: Path) -> None:
    values = iter([None, 0.1, 0.3])

    def learn(lesson: Lesson, report: Report) -> float:
        value = next(values)
        if value is None:
            raise BadOutput("the loss is not finite")
        return value

    found = tune(Lesson.parse(ASKED), 3, learn, tmp_path)
    assert [row["state"] for row in found.rows] == ["fail", "complete", "complete"]
    assert [row["chosen"] for row in found.rows] == ["", "", "yes"]


def test_trials_that_all_fail_are_told(tmp_path: Path) -> None:
    def learn(lesson: Lesson, report: Report) -> float:
        raise BadOutput("the loss is not finite")

    with pytest.raises(BadOutput, match="none of 2 trials ended: the loss is not finite"):
        tune(Lesson.parse(ASKED), 2, learn, tmp_path)
