from __future__ import annotations

import gc

import pytest

from perseus_plugin.leader.plan_shelf import PlanShelf
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.process import plan_for
from perseus_plugin.planning.request import PlanRequest
from tests.factories import BLOCKING_W, profile, stream_of


@pytest.fixture(scope="module")
def plan() -> Plan:
    streams = [stream_of(2, 2)(stage) for stage in range(2)]
    return plan_for(PlanRequest("A", streams, {}, profile(2), [BLOCKING_W] * 2, 0.0))


def test_a_plan_that_takes_anothers_place_leaves_nothing_of_it_behind(plan: Plan) -> None:
    shelf = PlanShelf(2)
    told: list[int] = []
    for _ in range(20):
        shelf.put("A", plan, profile(2))
        made = shelf.set_with()
        assert [parts.version for parts in made.parts] == [made.version] * 2, "for both stages"
        told.append(made.version)
        for version in shelf.tidy(told[-2:]):
            told.remove(version)
    assert told == [19, 20], "the one before is followed until the newest holds"
    gc.collect()
    kept = [one for one in gc.get_referrers(plan) if type(one).__name__ == "_Kept"]
    assert len(kept) == 2


def test_a_stand_in_for_a_plan_in_force_stays(plan: Plan) -> None:
    shelf = PlanShelf(2)
    shelf.put("A", plan, profile(2))
    stand_in = shelf.keep("A", plan, profile(2), (1.0, 1.2))
    made = shelf.set_with(stand_in)
    assert shelf.tidy([]) == []
    again = shelf.set_with(stand_in)
    assert (again.version, again.parts) == (made.version, ()), "it has been told"


def test_a_copy_changes_by_itself(plan: Plan) -> None:
    shelf = PlanShelf(2)
    shelf.put("A", plan, profile(2))
    first = shelf.set_with()
    copy = shelf.copy()
    copy.put("B", plan, profile(2))
    assert copy.set_with().version == 2
    copy.take_out("A")
    assert (shelf.schedules, copy.schedules) == (["A"], ["B"])
    assert shelf.set_with().version == first.version
