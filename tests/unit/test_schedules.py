"""Shares on a schedule: exact at its points, never falling, refused where they cannot be."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighten.errors import UnknownName, WrongUse
from lighten.schedules import SHAPES, Clock, Schedule

shapes = st.sampled_from(sorted(SHAPES))


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    first = draw(st.floats(0, 0.6))
    return Schedule(
        draw(st.floats(first, 0.99)), start := draw(st.integers(0, 50)),
        start + draw(st.integers(0, 90)), draw(st.integers(1, 40)), draw(shapes), first,
    )  # fmt: skip


@given(schedules())
def test_shares_never_fall_and_end_where_they_should(schedule: Schedule) -> None:
    shares = [schedule.at(n) for n in range(schedule.end + 10)]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(shares))
    assert shares[-1] == schedule.at(schedule.end) == pytest.approx(schedule.last, abs=1e-12)
    assert set(shares[: schedule.start]) <= {schedule.first}


@given(schedules())
def test_every_update_is_due_once(schedule: Schedule) -> None:
    points = dict(schedule.points())
    assert len(points) == schedule.updates
    clock = Clock(schedule)
    assert [n for n in range(schedule.end + 5) if clock.tick(n)] == list(points)
    clock.finished()


def test_cubic_is_the_formula_of_its_source() -> None:
    schedule = Schedule(last=0.9, start=100, end=500, every=100, first=0.1)
    for step, share in schedule.points():
        assert share == pytest.approx(0.9 - 0.8 * (1 - (step - 100) / 400) ** 3)
    assert schedule.at(250) == schedule.at(200)


def test_iterative_takes_the_same_share_of_what_is_left() -> None:
    schedule = Schedule(last=0.9, start=0, end=40, every=10, shape="iterative")
    left = [1 - share for _, share in schedule.points()]
    ratios = {round(b / a, 9) for a, b in itertools.pairwise(left)}
    assert len(ratios) == 1


def test_one_shot_is_done_at_the_first_update() -> None:
    schedule = Schedule(last=0.9, start=7, end=40, every=10, shape="one-shot")
    assert (schedule.at(6), schedule.at(7)) == (0.0, 0.9)


def test_an_update_that_was_jumped_over_is_made_later_and_once() -> None:
    clock = Clock(Schedule(last=0.9, start=10, end=40, every=10))
    assert [clock.tick(n) for n in (5, 35, 35, 36, 99)] == [False, True, False, False, True]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": 5, "end": 4}, "from step 5 to step 4"),
        ({"start": -1, "end": 4}, "from step -1"),
        ({"start": 0, "end": 4, "every": 0}, "every 0 steps"),
        ({"start": 0, "end": 4, "last": 1.0}, "to 1 cannot be pruned"),
        ({"start": 0, "end": 4, "last": 0.5, "first": 0.6}, "from 0.6 to 0.5"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(WrongUse, match=said):
        Schedule(**{"last": 0.9, **options})  # type: ignore[arg-type]


def test_an_unknown_shape_has_a_nearest_name() -> None:
    with pytest.raises(UnknownName, match="did you mean `cubic`"):
        Schedule(last=0.9, start=0, end=4, shape="cubci")


def test_steps_do_not_go_backwards_and_training_does_not_stop_early() -> None:
    clock = Clock(Schedule(last=0.9, start=0, end=4))
    clock.tick(3)
    clock.tick(3)
    with pytest.raises(WrongUse, match="step 2 comes after step 3"):
        clock.tick(2)
    with pytest.raises(WrongUse, match="stopped at step 3, pruning ends at step 4"):
        clock.finished()
