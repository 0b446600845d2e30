from __future__ import annotations

from perseus_plugin.iteration.replayed import Overheads
from perseus_plugin.leader.reviews import Reviews, said_of_overheads

LARGE, SMALL = Overheads(0.5, 1.0, 22.0, 9.0), Overheads(0.003, 0.1, 22.0, 0.4)


def test_a_large_share_beside_the_work_is_warned_of_once() -> None:
    (said,) = said_of_overheads("1F1B", LARGE, None)
    assert said.level == "warning"
    assert (said.text % said.values).startswith(
        "9 s of 22 s of an iteration of 1F1B are neither computing nor loading: "
    )
    assert said_of_overheads("1F1B", LARGE, LARGE) == []
    assert [one.level for one in said_of_overheads("1F1B", LARGE, SMALL)] == ["warning"], "it has become large"


def test_a_small_share_is_told_and_one_that_was_not_measured_is_not() -> None:
    (said,) = said_of_overheads("1F1B", SMALL, LARGE)
    assert said.level == "info"
    assert said.text % said.values == (
        "1.8 % of an iteration of 1F1B are neither computing nor loading (3 ms per transfer, 0.1 s once)"
    )
    assert said_of_overheads("1F1B", Overheads(0.003), None) == []


def looks(hinges: list[bool], iterations: int) -> list[int]:
    """Iterations in which a plan is looked at that stays in force, by whether one iteration decided, each time."""
    reviews, seen, told = Reviews(), [], iter(hinges)
    reviews.follow("1F1B", None, 0, next(told))
    for iteration in range(iterations):
        if reviews.due(["1F1B"], iteration) is not None:
            seen.append(iteration)
            reviews.stay("1F1B", next(told, False))
    return seen


def test_a_plan_is_looked_at_soon_where_one_iteration_decided_and_less_often_each_time() -> None:
    assert looks([False] * 4, 350) == [100, 200, 300]
    assert looks([True, False, False, False], 350) == [12, 112, 212, 312]
    assert looks([True] * 8, 350) == [12, 36, 84, 180, 280]
    assert looks([False, True, False, False], 250) == [100, 112, 212]
