from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.leader.job_schedules import JobSchedules
from tests.factories import stream_of

STREAMS = stream_of(2, 4)


def seen(keys: str, at_most: int = 16) -> JobSchedules:
    """Iterations that ran these schedules."""
    made = JobSchedules(at_most)
    for number, key in enumerate(keys):
        made.use(key, STREAMS)
        made.ran(key, number)
    return made


def test_the_newest_is_planned_first_then_the_one_before() -> None:
    made = seen("ABC")
    planned: list[str] = []
    while (following := made.next_to_plan(planned)) is not None:
        planned.append(following[0])
    assert planned == ["C", "B", "A"]


def test_a_schedule_that_cannot_be_planned_is_not_asked_for_again_until_measurements_change() -> None:
    made = seen("AB")
    made.refuse("B")
    assert made.next_to_plan([]) == ("A", None)
    assert made.next_to_plan(["A"]) is None
    made.forget_refusals()
    assert made.next_to_plan(["A"]) == ("B", None)


def test_beyond_so_many_schedules_that_take_turns_further_ones_go_without() -> None:
    made = seen("ABC" * 200, at_most=2)
    assert made.next_to_plan(["A", "B"]) is None
    assert made.too_many
    assert not seen("ABC" * 200, at_most=3).too_many


def test_a_ramp_up_never_runs_out_of_plans() -> None:
    """Each schedule runs for long, and never again."""
    keys = [f"{number}" for number in range(20)]
    made = JobSchedules(at_most=2)
    planned: list[str] = []
    for number in range(20 * 400):
        key = keys[number // 400]
        made.use(key, STREAMS)
        made.ran(key, number)
        following = made.next_to_plan(planned)
        if following is not None:
            assert following[1] is None or following[1] in planned
            planned = [one for one in planned if one != following[1]] + [following[0]]
            assert len(planned) <= 2
    assert planned[-1] == keys[-1]
    assert not made.too_many


def test_the_usual_schedule_is_the_one_that_runs_most_and_does_not_flip() -> None:
    made = seen("ABABABABAB")
    usual = made.usual(["A", "B"])
    assert usual in ("A", "B")
    for number in range(10, 60):
        made.ran("AB"[number % 2], number)
        assert made.usual(["A", "B"], usual) == usual
    for number in range(60, 100):
        made.ran("B", number)
    assert made.usual(["A", "B"], "A") == "B"
    assert made.usual(["A"], "B") == "A"
    assert made.usual([]) is None


@given(st.lists(st.sampled_from("ABCDEFG"), min_size=1, max_size=80), st.integers(1, 4))
def test_never_more_are_planned_for_than_there_is_room(keys: list[str], at_most: int) -> None:
    made = JobSchedules(at_most)
    planned: list[str] = []
    for number, key in enumerate(keys):
        made.use(key, STREAMS)
        made.ran(key, number)
        following = made.next_to_plan(planned)
        if following is not None:
            assert following[0] not in planned
            planned = [one for one in planned if one != following[1]] + [following[0]]
    assert len(planned) == min(at_most, len(planned))
    assert set(planned) <= set(keys)
    assert made.usual(planned) in planned
    with pytest.raises(KeyError):
        made.stream_of("H")
